"""Embed a checkpoint of train.py in half precision, if that changes its top-1 by less than 0.05 points.

    python -m scripts.weights.embed_weights CHECKPOINT finet_large_se_g4.tiny_in200 --data-dir PACK

EMA weights are used if the checkpoint has them. All values except running variances become float16. timm's validate.py
compares the precisions on the validation set that train.py used, half precision in train and in fused form.

Then timm_finet/weights gets the file, its line in SHA256SUMS, and TAG.txt with the class names from PACK/classes.txt.
results/MODEL.TAG.yaml and .csv get the run's arguments and its accuracy by epoch, for the card. Afterwards, add the tag
to the network's default_cfgs, and a record to timm_finet/data/datasets.py.
"""
import hashlib
import os
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from timm.models import load_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from scripts.report import RESULTS, command_line, write_rows
from scripts.runs import epochs_of
from scripts.weights.validate_weights import validate
from timm_finet.data.datasets import WEIGHTS
from timm_finet.hub.repository import LOCAL_ARGS

MOVES = 0.05  # percentage points
ROOM = 60_000_000  # bytes for all embedded weights together


def halve(state):
    """Convert floating-point values to float16, except variances, which may be out of its range."""
    return {
        key: value.half() if value.is_floating_point() and not key.endswith('running_var') else value
        for key, value in state.items()}


def top1(state, model, data_dir, args, *options):
    """Top-1 by timm's validate.py, in float32 arithmetic."""
    is_pack = (data_dir / 'validation.tar').is_file()
    dataset, split = ('', 'validation.tar') if is_pack else (args['dataset'] or '', args['val_split'])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'model.safetensors')
        save_file({key: value.contiguous() for key, value in state.items()}, file)
        return validate(
            '--model', model, '--checkpoint', str(file), '--data-dir', str(data_dir), '--dataset', dataset,
            '--split', split, '--num-classes', str(args['num_classes']), '--input-size', *map(str, args['input_size']),
            '--mean', *map(str, args['mean']), '--std', *map(str, args['std']), '--crop-pct', str(args['crop_pct']),
            '--interpolation', args['interpolation'],
            '--model-kwargs', *(f'{key}={value}' for key, value in (args['model_kwargs'] or {}).items()),
            '--device', 'cuda' if torch.cuda.is_available() else 'cpu', *options)['top1']


def embed(state, name, names, weights=WEIGHTS):
    """Write the weights, their checksum and the class names."""
    file = weights / f'{name}.safetensors'
    part = file.with_suffix('.part')
    save_file({key: value.contiguous() for key, value in state.items()}, part)
    size = part.stat().st_size + sum(other.stat().st_size for other in weights.glob('*.safetensors') if other != file)
    if size > ROOM:
        part.unlink()
        raise ValueError(f'{name} would make the embedded weights {size / 1e6:.1f} MB, more than {ROOM / 1e6:.0f} MB.')
    part.chmod(0o644)  # safetensors makes it readable to its owner only
    os.replace(part, file)
    record = weights / 'SHA256SUMS'  # it also lists weights on the Hub
    sums = dict(line.split()[::-1] for line in record.read_text().splitlines()) if record.is_file() else {}
    sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    record.write_text(''.join(f'{value}  {key}\n' for key, value in sorted(sums.items())))
    if names:
        (weights / f"{name.split('.')[1]}.txt").write_text('\n'.join(names) + '\n')


def record(checkpoint, name, args, results=RESULTS):
    """Write the run's arguments, without this machine's paths, and its log."""
    args = {key: value for key, value in args.items() if key not in LOCAL_ARGS}
    (results / f'{name}.yaml').write_text(yaml.safe_dump(args))
    rows = epochs_of(checkpoint.with_name('summary.csv'))
    write_rows(results / f'{name}.csv', [{key: f'{float(value):g}' for key, value in row.items()} for row in rows])


def main():
    parser = command_line(__doc__)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('name', metavar='MODEL.TAG')
    parser.add_argument('--data-dir', type=Path, required=True)
    opts = parser.parse_args()
    args = vars(load_checkpoint_metadata(opts.checkpoint)['args'])
    state = load_state_dict(str(opts.checkpoint))
    half = halve(state)
    model = opts.name.split('.')[0]
    full = top1(state, model, opts.data_dir, args)
    others = [top1(half, model, opts.data_dir, args, *form) for form in ((), ('--reparam',))]
    print(f'top-1: {full} in full precision, {others[0]} in half, {others[1]} in half and fused')
    if max(abs(full - other) for other in others) >= MOVES:
        parser.exit(2, f'embed_weights.py: half precision changes top-1 by {MOVES} points or more: not embedded.\n')
    classes = opts.data_dir / 'classes.txt'
    names = [line.split('\t')[1] for line in classes.read_text().splitlines()] if classes.is_file() else []
    try:
        embed(half, opts.name, names)
    except ValueError as error:
        parser.exit(2, f'embed_weights.py: {error}\n')
    record(opts.checkpoint, opts.name, args)


if __name__ == '__main__':
    main()
