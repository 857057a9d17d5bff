"""The command `timm-finet`."""
import argparse

from . import demo, export, flops, hub, launch, space


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog='timm-finet', description='Finet and Fine-grained Batch Normalization for timm.')
    commands = parser.add_subparsers(dest='command', required=True)

    sub = commands.add_parser('demo', help='classify pictures with an embedded network, before and after fusion')
    sub.add_argument('paths', nargs='*', metavar='PATH', help='own pictures or folders of them, instead of the shipped ones')
    sub.add_argument('--output', default='finet_demo.png', help='contact sheet to write (default: %(default)s)')

    sub = commands.add_parser('flops', help='count multiply-adds and parameters of any network of timm or torchvision')
    sub.add_argument('names', nargs='*', metavar='NAME', help="e.g. 'finet_*' or torchvision:shufflenet_v2_x1_5; default: ours")
    sub.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help="default: each network's own")
    form = sub.add_mutually_exclusive_group()
    form.add_argument('--fused', action='store_true', default=True, help='count the deploy form (the default)')
    form.add_argument('--train-form', action='store_false', dest='fused', help='count the form that is trained')
    sub.add_argument('--csv', action='store_true', help='print CSV')

    sub = commands.add_parser('export', help='write a fused network as an ONNX or ExecuTorch file, checked on pictures')
    sub.add_argument('name', metavar='NAME', help='a network of timm, e.g. finet_small_g4.cifar10')
    sub.add_argument('--to', required=True, choices=export.SUFFIXES)
    sub.add_argument('--int8', action='store_true', help='quantise weights and activations')
    sub.add_argument('--checkpoint', metavar='FILE', help='weights to use, in train or fused form')
    sub.add_argument('--calibration', nargs='+', default=(), metavar='PATH', help='pictures for --int8, of the training set')
    sub.add_argument('--output', metavar='FILE', help='default: NAME.onnx, NAME.pte, NAME.int8.onnx or NAME.int8.pte')

    sub = commands.add_parser('run', help="run timm's train, validate, benchmark, inference or onnx_export with our models")
    sub.add_argument('script', metavar='SCRIPT', help="a path, or a bare name: looked up in $TIMM_SCRIPTS, else fetched")
    sub.add_argument('args', nargs=argparse.REMAINDER, help="the script's own arguments; recipe:NAME stands for our YAML")

    sub = commands.add_parser('push', help='push a checkpoint, with its card, to the Hugging Face Hub')
    sub.add_argument('checkpoint', metavar='CHECKPOINT', help="of timm's train.py (its EMA, where it has one), or a state dict")
    sub.add_argument('--model', required=True, metavar='NAME', help='the network, as in results.csv')
    sub.add_argument('--repo-id', required=True, metavar='ORG/NAME', help='created where it does not exist')
    sub.add_argument('--private', action='store_true', help='create it as a private repository')
    sub.add_argument('--revision', metavar='BRANCH', help='push to this branch, created where it does not exist')
    sub.add_argument('--fused', action='store_true', help='push the fused form: for inference alone')
    sub.add_argument('--results', metavar='CSV', help="accuracies for the card, as timm's validate.py --results-file writes them")
    sub.add_argument('--dry-run', action='store_true', help='print the card and the files, push nothing')

    commands.add_parser('space', help='serve a web page that classifies pictures, in train and in fused form')

    args = parser.parse_args(argv)
    try:
        if args.command == 'demo':
            demo.demo(args.paths, args.output)
        elif args.command == 'flops':
            flops.flops(args.names, args.input_size, args.fused, args.csv)
        elif args.command == 'push':
            hub.push_checkpoint(
                args.checkpoint, args.model, args.repo_id, args.private, args.revision, args.fused, args.results, args.dry_run)
        elif args.command == 'export':
            export.export(args.name, args.to, args.output, args.int8, args.checkpoint, args.calibration)
        elif args.command == 'space':
            space.space()
        else:
            script = launch.resolve(args.script, args.args)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(2, f'timm-finet {args.command}: {error}\n')
    if args.command == 'run':
        launch.run(script)  # outside the net: what a script raises is its own
