"""Arguments of the command `timm-finet`.

The package takes seconds to import torch and timm. This module is outside of it, so that --help and errors come at
once.
"""
import argparse
from importlib.metadata import version

__all__ = ['main']


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-finet', description='Finet and Fine-grained Batch Normalization for timm.')
    parser.add_argument('--version', action='version', version=f"%(prog)s {version('timm-finet')}")
    commands = parser.add_subparsers(dest='command', required=True)

    sub = commands.add_parser('demo', help='classify images with embedded weights, before and after fusion')
    sub.add_argument(
        'paths', nargs='*', metavar='PATH', help='your own images, or folders of them, instead of the shipped images')
    sub.add_argument('--output', default='finet_demo.png', help='contact sheet to write (default: %(default)s)')

    sub = commands.add_parser('flops', help='count multiply-adds and parameters of any network of timm or torchvision')
    sub.add_argument(
        'names', nargs='*', metavar='NAME', help="e.g. 'finet_*' or torchvision:shufflenet_v2_x1_5; default: ours")
    sub.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help="default: each network's own")
    form = sub.add_mutually_exclusive_group()
    form.add_argument('--fused', action='store_true', default=True, help='count the deploy form (the default)')
    form.add_argument('--train-form', action='store_false', dest='fused', help='count the train form')
    sub.add_argument('--csv', action='store_true', dest='as_csv', help='print CSV')

    sub = commands.add_parser('export', help='write a fused network as an ONNX or ExecuTorch file, checked on images')
    sub.add_argument('name', metavar='NAME', help='a network of timm, e.g. finet_small_g4.cifar10')
    sub.add_argument('--to', required=True, choices=('onnx', 'executorch'))
    sub.add_argument('--int8', action='store_true', help='quantise weights and activations')
    sub.add_argument('--checkpoint', metavar='FILE', help='weights to use, in train or fused form')
    sub.add_argument(
        '--calibration', nargs='+', default=(), metavar='PATH',
        help='training images for --int8, or folders of them')
    sub.add_argument(
        '--img-size', type=int, metavar='PX', help='height and width (default: the size the weights are tested at)')
    sub.add_argument('--dynamic-batch', action='store_true', help='accept any batch size (onnx only)')
    sub.add_argument('--output', metavar='FILE', help='default: NAME.onnx, NAME.pte, NAME.int8.onnx or NAME.int8.pte')

    sub = commands.add_parser(
        'run', help="run timm's train, validate, benchmark, inference or onnx_export with our models")
    sub.add_argument(
        'script', metavar='SCRIPT',
        help='a path, or a bare name, which is looked up in $TIMM_SCRIPTS or else downloaded')
    sub.add_argument(
        'args', nargs=argparse.REMAINDER,
        help="the script's own arguments; recipe:NAME stands for a YAML file of this package")

    sub = commands.add_parser(
        'finetune', help='fine-tune a network on your own images, one folder per class', allow_abbrev=False,
        epilog="Other options, e.g. --epochs 5 or --config recipe:modern_finetune, are passed to timm's train.py.")
    sub.add_argument('folder', metavar='FOLDER', help='CLASS/*.jpg, or train/CLASS/*.jpg and validation/CLASS/*.jpg')
    sub.add_argument('--weights', metavar='NAME.TAG', help=(
        'weights of timm, hf-hub:ORG/NAME, local-dir:FOLDER or a checkpoint; default: finet_large_se_g4.tiny_in200'))
    sub.add_argument('--output', metavar='FOLDER', help='a new folder; default: output/finetune/FOLDER')

    sub = commands.add_parser('push', help='push a checkpoint, with its card, to the Hugging Face Hub')
    sub.add_argument(
        'checkpoint', metavar='CHECKPOINT',
        help="a checkpoint of timm's train.py (its EMA weights, if it has them), or a state dict")
    sub.add_argument(
        '--model', required=True, dest='name', metavar='NAME', help="the network's name, as in the --results file")
    sub.add_argument('--repo-id', required=True, metavar='ORG/NAME', help='created if it does not exist')
    sub.add_argument('--private', action='store_true', help='create it as a private repository')
    sub.add_argument('--revision', metavar='BRANCH', help='push to this branch, created if it does not exist')
    sub.add_argument('--fused', action='store_true', help='push the fused form, which is for inference only')
    sub.add_argument(
        '--results', metavar='CSV', help="accuracies for the card, as timm's validate.py --results-file writes them")
    sub.add_argument(
        '--class-names', metavar='FILE',
        help='class names, one per line; default: those of the data set, if it is still there')
    sub.add_argument('--dry-run', action='store_true', help='print the card and the list of files, push nothing')

    commands.add_parser('space', help='serve a web page that classifies images, in train and in fused form')

    return parser


def main(argv=None) -> None:
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == 'finetune':
        args.options = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        from timm_finet.commands.main import run
        run(args)
    except KeyboardInterrupt:
        parser.exit(130, f'timm-finet {args.command}: interrupted.\n')
