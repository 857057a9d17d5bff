"""Model cards: their text, and the figures that go into it."""
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_input_data_config
from timm.models._input import get_model_args

from ..data.datasets import DATASETS, UNKNOWN
from ..fbn import FBNConv2d
from ..finet import Finet
from ..flops import count_flops
from ..rewrite import fuse_fbn

__all__ = ['make_card', 'read_results']

FIGURES = Path(__file__).parents[2] / 'scripts' / 'results'  # there in a checkout of the source alone
RECIPE = (
    'epochs', 'batch_size', 'world_size', 'grad_accum_steps', 'opt', 'lr', 'sched', 'warmup_epochs', 'momentum',
    'weight_decay', 'smoothing', 'drop', 'mixup', 'cutmix', 'reprob', 'aa', 'pretrained', 'model_ema', 'amp')

BODY = '''
# {name}

{architecture} is an image classifier: {family} use Fine-grained Batch Normalization (FBN,
[arXiv 2005.06828](https://arxiv.org/abs/2005.06828)) with G = {groups}. FBN splits a convolution's input into G groups,
batch-normalises each group's partial sum and adds them up; for inference all of it folds into one plain convolution.
These weights are in {form}.
{block}
| | train form | fused, for inference |
|---|---|---|
| parameters | {params[0]:,} | {params[1]:,} |
| multiply-adds at {tested_at} | {macs[0]:,} | {macs[1]:,} |

A multiply-add counts as one; convolutions and linear layers, by fvcore (`timm_finet.flops`).

## Usage

```python
import timm_finet  # registers the network with timm
import timm
import torch
from timm_finet.images import read_image

model = timm.create_model('{source}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model, use_test_size=True))
image = read_image('image.png')  # RGB, turned as its EXIF data say
with torch.inference_mode():
    probabilities, classes = model(transform(image)[None]).softmax(1)[0].topk({top})
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for probability, index in zip(probabilities, classes):
    print(f'{{names[index]}} {{probability:.1%}}')
```
{fuse}
## Training

{training}

## Accuracy

{accuracy}

## Speed

{speed}

## Limits

Trained on {dataset} at {size}: it knows these {num_classes} classes and no others, and is no better than its training
images. One run gives one figure; other seeds will differ. {choice}The fused form cannot be trained further with batch
statistics.

## Licence and citation

{licence}

```bibtex
@article{{luo2020finet,
  title={{Finet: Using Fine-grained Batch Normalization to Train Light-weight Neural Networks}},
  author={{Luo, Chunjie and Zhan, Jianfeng and Wang, Lei and Gao, Wanling}},
  journal={{arXiv preprint arXiv:2005.06828}},
  year={{2020}}
}}
```
'''


FIGURE = '''
![A block in train and in fused form]({file})

The figure shows {shown}; others of the family differ in width and in G.
'''

FOUR_RUNS = (
    'The arguments are those of the last of four runs, each from the averaged weights of the one before: 5 epochs at '
    '64 px, 6 at 96 px and 7 at 128 px, the learning rate one straight line from 0.4 to zero over these, and 7 more at '
    '128 px from 0.1. Each had two processes, 256 images a step in all. The size for testing was chosen on the '
    'validation images among 128, 160 and 192 px.')
RESUMED = (
    'The run was stopped, and resumed from its own checkpoint, after epoch 16: in two processes it then draws its '
    'crops from the seed anew, so a run in one piece will end a little differently.')
FINISHED_ON_A_CPU = (
    'The first 66 of the 72 epochs ran on an NVIDIA H200, the last six on two CPU cores in two processes, with a '
    'momentum that began anew: a run in one piece will end a little differently.')
AT_SECOND_HAND = (
    'The targets are the mean of the label and of the probabilities of a teacher, a linear head on the features that '
    'EfficientNet-Lite2 has learnt from ImageNet: these weights know ImageNet at second hand. The photographs were '
    'enlarged from 64 px.')
GRAY = (
    'In gray photographs these weights recognise far less: of 204 photographs of bees they call {}% a bee in colour '
    'and {}% in gray.')

NOTES = {  # on the training of weights, paragraphs of their cards
    'finet_large_se_g4.tiny_in200': (
        FOUR_RUNS + ' The first was begun as one of 14 epochs and stopped after its fifth.', AT_SECOND_HAND,
        GRAY.format(56.9, 2.9)),
    'finet_large_se_g4.cifar10': (FINISHED_ON_A_CPU,),
    'finet_large_se_g4.cifar100': (RESUMED,),
    'finet_small_se_g4.tiny_in200': (FOUR_RUNS, AT_SECOND_HAND, GRAY.format(59.8, 0.0)),
    'finet_small_g4.cifar10': (
        'The run was stopped, and resumed from its own checkpoints, after epochs 3, 4 and 24, with a first version of '
        'the moment form: the same mathematics, other rounding.',),
}


def read_results(file: str, name: str) -> List[Dict[str, str]]:
    """The rows of a results file for one network: at least `model`, `top1` and `top5`, as timm's validate.py writes.

    Where no row has that very name, a row with a tag stands for a name without one, and the other way round.

    Raises:
        ValueError: It lacks these columns, or such rows, or has rows of several tags.
    """
    with open(file, newline='') as lines:
        rows = list(csv.DictReader(lines))
    missing = {'model', 'top1', 'top5'} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"--results {file!r} lacks the columns {', '.join(sorted(missing))}.")
    architecture, _, tag = name.partition('.')
    alike = {name, architecture} if tag else {r['model'] for r in rows if r['model'].split('.')[0] == architecture}
    found = [row for row in rows if row['model'] == name] or [row for row in rows if row['model'] in alike]
    names = ', '.join(sorted({row['model'] for row in found or rows}))
    if not found:
        raise ValueError(f'--results {file!r} has no row for {name!r}: it has {names}.')
    if ',' in names:
        raise ValueError(f'--results {file!r} has rows for {names}: which is it? Give one of them as --model.')
    return found


def make_card(
        model: nn.Module, name: str, source: str, results: Sequence[Dict[str, str]] = (),
        args: Optional[Dict[str, Any]] = None, log: Optional[str] = None,
        speed: Sequence[Dict[str, str]] = (), epochs: Optional[int] = None, top1: Optional[float] = None,
        base: str = '') -> ModelCard:
    """The model card. Its figures come from the network and from the results and the log that are given.

    Args:
        model: In either form; its `pretrained_cfg` describes the weights.
        name: Title of the card.
        source: What `timm.create_model` loads: a name with a tag, or `hf-hub:ORG/NAME`.
        results: Rows of a results file, one a form.
        args: The training arguments.
        log: Path of train.py's summary.csv.
        speed: Rows of results/weights_speed.csv.
        epochs: How many made these weights.
        top1: Of these weights, as train.py measured it, in percent.
        base: The weights that training began from.
    """
    args, cfg = args or {}, model.pretrained_cfg
    model_args = get_model_args(model)
    twin = timm.create_model(cfg['architecture'], **{**model_args, 'fused': False}).eval()
    tested_at = resolve_input_data_config(model, use_test_size=True)['input_size']
    counts = [count_flops(network, tested_at) for network in (twin, fuse_fbn(twin))]
    groups = sorted({m.fbn_groups for m in twin.modules() if isinstance(m, FBNConv2d)})
    dataset = DATASETS.get(cfg.get('tag') or args.get('dataset'), UNKNOWN)
    is_known = dataset.hub != UNKNOWN.hub
    if not is_known and cfg.get('description'):
        dataset = replace(dataset, title=cfg['description'].removeprefix('trained on '))
    form = 'fused' if model_args['fused'] else 'train'

    metrics = [row for row in results if row.get('form', form) == form]
    if len(metrics) > 1:
        raise ValueError(f'results has {len(metrics)} rows for {name} in {form} form: one is needed.')
    evaluations = [
        EvalResult(
            task_type='image-classification', dataset_type=dataset.hub, dataset_name=dataset.title,
            dataset_split=dataset.split, metric_type='accuracy', metric_name=title, metric_value=float(row[column]))
        for row in metrics for column, title in (('top1', 'Top-1 accuracy'), ('top5', 'Top-5 accuracy'))]
    data = ModelCardData(
        model_name=name, library_name='timm', pipeline_tag='image-classification', license=cfg['license'],
        license_name='research-and-teaching' if cfg['license'] == 'other' else None,
        tags=['image-classification', 'timm', 'finet', 'fine-grained-batch-normalization', 'arxiv:2005.06828'],
        datasets=[dataset.hub] if is_known else None, eval_results=evaluations or None)

    body = BODY.format(
        name=name, source=source, architecture=cfg['architecture'], dataset=dataset.title,
        num_classes=model.num_classes, groups=', '.join(map(str, groups)),
        family=(
            'a light-weight Finet, whose 1x1 convolutions' if isinstance(model, Finet)
            else 'a ResNet, whose convolutions'),
        form='train form' if form == 'train' else 'fused form, for inference', top=min(5, model.num_classes),
        block=figure_section(model),
        params=[count['params'] for count in counts], macs=[count['conv'] + count['linear'] for count in counts],
        size='x'.join(map(str, cfg['input_size'])), tested_at='x'.join(map(str, tested_at)),
        choice='' if not isinstance(model, Finet) else (
            "The paper gives no code: its parameter counts are reproduced exactly, but where a block's second\nReLU "
            'stands is a choice of this implementation (`act_place`). '),
        fuse='' if form == 'fused' else (
            '\nFor inference, fold all normalisation away: `model = timm_finet.fuse_fbn(model)`.\n'),
        training=training_section(cfg, args, dataset.title, log, epochs, top1, base),
        accuracy=accuracy_section(results, dataset, args),
        speed=speed_section(speed),
        licence=licence_section(cfg, dataset, base))
    return ModelCard(f'---\n{data.to_yaml()}\n---\n{body}')


def figure_section(model) -> str:
    if not isinstance(model, Finet):
        return ''
    file, shown = 'block_se.png', 'finet_large_se_g4'
    if model.stages[0][0].se is None:
        file, shown = 'block.png', 'finet_large_g4'
    return FIGURE.format(file=file, shown=shown) if (FIGURES / file).is_file() else ''


def licence_section(cfg, dataset, base) -> str:
    lines = ['The code, timm-finet, is under Apache-2.0.']
    if not cfg['license']:
        lines.append('The owner has not stated a licence of these weights.')
    elif cfg['license'] != 'other':
        lines.append(f"These weights are under {cfg['license']}.")
    if dataset.terms:
        lines.append(
            f'The photographs of {dataset.title} {dataset.terms}: take these weights for research and teaching.')
    if base:
        lines.append(f'What goes for `{base}`, which training began from, goes for these weights too.')
    return ' '.join([*lines, 'Please cite the paper:'])


def training_section(cfg, args, dataset, log, epochs, top1, base) -> str:
    lines = [f'Data set: {dataset}. ' + (
        "Arguments of timm's train.py, the rest of which is in [args.yaml](args.yaml):" if args
        else 'The training arguments were not recorded.')]
    usual = dict(world_size=1, grad_accum_steps=1)  # a step has batch_size images times both
    settings = [key for key in RECIPE if args.get(key) and args[key] != usual.get(key)]
    if settings:
        lines += ['', '| ' + ' | '.join(settings) + ' |', '|' + '---|' * len(settings),
                  '| ' + ' | '.join(str(args[key]) for key in settings) + ' |']
    if base:
        lines += ['', f'Training began from `{base}`.']
    if epochs:
        dtype = f" in {args.get('amp_dtype') or 'float16'}" if args.get('amp') else ''
        measured = '' if top1 is None else f', with {round(top1, 2)}% top-1 as train.py measured it{dtype}'
        lines += ['', f"These weights are those after {epochs} epoch{'s' * (epochs > 1)}{measured}."]
    if log:
        lines += ['', 'Accuracy by epoch is in [summary.csv](summary.csv).']
    for note in NOTES.get(f"{cfg['architecture']}.{cfg.get('tag')}", cfg.get('notes') or ()):
        lines += ['', note]
    return '\n'.join(lines)


def accuracy_section(results, dataset, args) -> str:
    if not results:
        return 'Not measured apart from the training log.'
    lines = ['| form | input, px | top-1 | top-5 | measured by |', '|---|---|---|---|---|']
    lines += [
        f"| {row.get('form', '')} | {row.get('img_size', '')} | {row['top1']} | {row['top5']} | "
        f"`{row.get('command', 'validate.py of timm')}` |"
        for row in results]
    seed = f", seed {args['seed']}" if 'seed' in args else ''
    return '\n'.join(lines + ['', f'Percent of the {dataset.split} set ({dataset.title}), weights of one run{seed}.'])


def speed_section(rows) -> str:
    if not rows:
        return 'Not measured.'
    lines = ['| form | images a second | ms, quartiles |', '|---|---|---|']
    lines += [f"| {row['form']} | {row['images_per_second']} | {row['ms_low']} to {row['ms_high']} |" for row in rows]
    setting = 'Batch 1, {img_size} px, {threads} thread of {device}, {runtime}, the forms in turns.'
    lines += ['', setting.format(**rows[0])]
    return '\n'.join(lines)
