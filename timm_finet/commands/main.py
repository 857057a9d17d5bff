"""What each command of `timm-finet` does with its arguments, which `timm_finet_cli` has read."""
import argparse
import sys

from ..hub.repository import push_checkpoint
from . import demo, export, finetune, flops, space
from . import run as scripts

__all__ = ['run']


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say; one line and status 2 for what was wrong with them, 1 where `demo` skipped files."""
    try:
        if args.command == 'demo':
            if not demo.demo(args.paths, args.output):
                sys.exit(1)
        elif args.command == 'flops':
            flops.flops(args.names, args.input_size, args.fused, args.csv)
        elif args.command == 'push':
            push_checkpoint(
                args.checkpoint, args.model, args.repo_id, args.private, args.revision, args.fused, args.results,
                args.class_names, args.dry_run)
        elif args.command == 'export':
            export.export(
                args.name, args.to, args.output, args.int8, args.checkpoint, args.calibration, args.img_size,
                args.dynamic_batch)
        elif args.command == 'finetune':
            prepared = finetune.prepare(args.folder, args.weights, args.output, args.options)
        elif args.command == 'space':
            space.space()
        else:
            script = scripts.resolve(args.script, args.args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f'timm-finet {args.command}: {error}', file=sys.stderr)
        sys.exit(2)
    if args.command == 'run':
        scripts.run(script)  # outside the net: what a script raises is its own
    elif args.command == 'finetune':
        finetune.train(*prepared)
