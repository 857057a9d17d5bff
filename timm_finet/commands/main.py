"""Run the commands of `timm-finet` with the arguments that `timm_finet_cli` has parsed."""
import argparse
import sys

from ..hub.repository import push_checkpoint
from . import demo, export, finetune, flops, space
from . import run as scripts

__all__ = ['run']

COMMANDS = {
    'demo': demo.demo, 'export': export.export, 'finetune': finetune.prepare, 'flops': flops.flops,
    'push': push_checkpoint, 'run': scripts.resolve, 'space': space.space}


def run(args: argparse.Namespace) -> None:
    """Run a command; exit with one line and status 2 after an error, or with status 1 if `demo` skipped files."""
    options = {key: value for key, value in vars(args).items() if key != 'command'}
    try:
        result = COMMANDS[args.command](**options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f'timm-finet {args.command}: {error}', file=sys.stderr)
        sys.exit(2)
    if args.command == 'demo' and not result:
        sys.exit(1)
    # Outside of the try block, because errors in timm's scripts are not ours to catch.
    if args.command == 'run':
        scripts.run(result)
    elif args.command == 'finetune':
        finetune.train(*result)
