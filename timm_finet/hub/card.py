"""Model cards: card.md filled in with figures of a network, its training and results files."""
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Sequence

import timm
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_input_data_config
from timm.models import get_model_args

from ..data.datasets import DATASETS, UNKNOWN, WEIGHTS, Dataset
from ..fbn import FBNConv2d
from ..finet import Finet
from ..flops import count_flops
from ..rewrite import fuse_fbn
from .checkpoint import Run

__all__ = ['make_card', 'read_results']

TEMPLATE = Path(__file__).with_name('card.md')
NOTES = WEIGHTS / 'notes.yaml'
RECIPE = (
    'epochs', 'batch_size', 'world_size', 'grad_accum_steps', 'opt', 'lr', 'sched', 'warmup_epochs', 'momentum',
    'weight_decay', 'smoothing', 'drop', 'mixup', 'cutmix', 'reprob', 'aa', 'pretrained', 'model_ema', 'amp')
CHOICE = (
    "The paper gives no code. Its parameter counts are reproduced exactly, but the position of a block's\n"
    'second ReLU is a choice of this implementation (`act_place`). ')


def read_results(file: str, name: str) -> List[Dict[str, str]]:
    """Read the rows for one network from a results file of timm's validate.py.

    If no row has exactly this name, a name without a tag matches rows with a tag, and a name with a tag matches rows
    without one.

    Raises:
        ValueError: The file lacks the columns `model`, `top1` and `top5`, has no row for the network, or has rows for
            several tags.
    """
    with open(file, newline='') as lines:
        rows = list(csv.DictReader(lines))
    missing = {'model', 'top1', 'top5'} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"--results {file!r} lacks the columns {', '.join(sorted(missing))}.")
    found = [row for row in rows if row['model'] == name]
    if not found:
        architecture, _, tag = name.partition('.')
        found = [row for row in rows if (row['model'] if tag else row['model'].split('.')[0]) == architecture]
    names = ', '.join(sorted({row['model'] for row in found or rows}))
    if not found:
        raise ValueError(f'--results {file!r} has no row for {name!r}: it has {names}.')
    if ',' in names:
        raise ValueError(f'--results {file!r} has rows for {names}: give one of them as --model.')
    return found


def make_card(
        model: nn.Module, name: str, source: str, run: Run = Run(), results: Sequence[Dict[str, str]] = (),
        speed: Sequence[Dict[str, str]] = (), figure: str = '') -> ModelCard:
    """Make the model card of a network.

    Args:
        model: The network in either form; its `pretrained_cfg` describes the weights.
        name: Title of the card.
        source: Name with which `timm.create_model` loads it: with a tag, or `hf-hub:ORG/NAME`.
        run: The training run.
        results: Rows of a results file, one per form.
        speed: Rows with the columns of scripts/results/weights_speed.csv.
        figure: A picture of the network and its caption, in Markdown.

    Raises:
        ValueError: `results` has several rows for the form of the network.
    """
    cfg, model_args, is_finet = model.pretrained_cfg, get_model_args(model), isinstance(model, Finet)
    dataset = dataset_of(cfg, run.args)
    twin = timm.create_model(cfg['architecture'], **{**model_args, 'fused': False}).eval()
    size = resolve_input_data_config(model, use_test_size=True)['input_size']
    train, fused = count(twin, size), count(fuse_fbn(twin), size)
    form = 'fused' if model_args['fused'] else 'train'
    data = metadata(name, cfg, dataset, form, results)
    body = TEMPLATE.read_text(encoding='utf-8').format(
        model=model, name=name, source=source, cfg=cfg, dataset=dataset, train=train, fused=fused,
        groups=', '.join(map(str, sorted({m.fbn_groups for m in twin.modules() if isinstance(m, FBNConv2d)}))),
        family='a light-weight Finet whose blocks' if is_finet else 'a ResNet whose blocks',
        choice=CHOICE if is_finet else '',
        form='train form' if form == 'train' else 'fused form, for inference',
        fuse='\nFor inference, fold all normalisation away: `model = timm_finet.fuse_fbn(model)`.\n'
        if form == 'train' else '',
        figure=f'\n{figure}\n' if figure else '',
        top=min(5, model.num_classes), size='x'.join(map(str, cfg['input_size'])), tested_at='x'.join(map(str, size)),
        training='\n\n'.join(training_section(cfg, run, dataset)),
        accuracy=accuracy_section(results, dataset, run.args), speed=speed_section(speed),
        licence=licence_section(cfg, dataset, run.base))
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{body}')


def dataset_of(cfg: Dict[str, Any], args: Dict[str, Any]) -> Dataset:
    dataset = DATASETS.get(cfg.get('tag') or args.get('dataset'), UNKNOWN)
    if dataset.hub == UNKNOWN.hub and cfg.get('description'):
        return replace(dataset, title=cfg['description'].removeprefix('trained on '))
    return dataset


def count(network: nn.Module, size: Sequence[int]) -> Dict[str, int]:
    counts = count_flops(network, size)
    return dict(params=counts['params'], macs=counts['conv'] + counts['linear'])


def metadata(
        name: str, cfg: Dict[str, Any], dataset: Dataset, form: str, results: Sequence[Dict[str, str]],
) -> ModelCardData:
    results = [row for row in results if row.get('form', form) == form]
    if len(results) > 1:
        raise ValueError(f'results has {len(results)} rows for {name} in {form} form: one is needed.')
    evaluations = [
        EvalResult(
            task_type='image-classification', dataset_type=dataset.hub, dataset_name=dataset.split_of or dataset.title,
            dataset_split=dataset.split, metric_type='accuracy', metric_name=title, metric_value=float(row[column]))
        for row in results for column, title in (('top1', 'Top-1 accuracy'), ('top5', 'Top-5 accuracy'))]
    return ModelCardData(
        model_name=name, library_name='timm', pipeline_tag='image-classification', license=cfg['license'],
        license_name='research-and-teaching' if cfg['license'] == 'other' else None,
        tags=['image-classification', 'timm', 'finet', 'fine-grained-batch-normalization', 'arxiv:2005.06828'],
        datasets=[dataset.hub] if dataset.hub != UNKNOWN.hub else None, eval_results=evaluations or None)


def table(*rows: Sequence[Any]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rest = ('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)
    return '\n'.join([head, '|' + '---|' * len(rows[0]), *rest])


def training_section(cfg: Dict[str, Any], run: Run, dataset: Dataset) -> List[str]:
    """Paragraphs about the training."""
    args = run.args
    arguments = "Arguments of timm's train.py ([args.yaml](args.yaml) lists all except local paths):"
    paragraphs = [f"Data set: {dataset.title}. {arguments if args else 'The training arguments were not recorded.'}"]
    usual = dict(world_size=1, grad_accum_steps=1)  # images per step: batch_size times both
    settings = [key for key in RECIPE if args.get(key) and args[key] != usual.get(key)]
    if settings:
        paragraphs.append(table(settings, [args[key] for key in settings]))
    if run.base:
        paragraphs.append(f'Training began from `{run.base}`.')
    if run.epochs:
        dtype = f" in {args.get('amp_dtype') or 'float16'}" if args.get('amp') else ''
        measured = '' if run.top1 is None else f'; train.py measured {round(run.top1, 2)}% top-1{dtype}'
        paragraphs.append(f"These are the weights after {run.epochs} epoch{'s' * (run.epochs > 1)}{measured}.")
    if run.log:
        paragraphs.append('Accuracy by epoch is in [summary.csv](summary.csv).')
    notes = yaml.safe_load(NOTES.read_text(encoding='utf-8'))
    return paragraphs + list(notes.get(f"{cfg['architecture']}.{cfg.get('tag')}", cfg.get('notes') or ()))


def accuracy_section(results: Sequence[Dict[str, str]], dataset: Dataset, args: Dict[str, Any]) -> str:
    if not results:
        return 'Not measured apart from the training log.'
    rows = [
        (row.get('form', ''), row.get('img_size', ''), row['top1'], row['top5'],
         f"`{row.get('command', 'validate.py of timm')}`") for row in results]
    seed = f", seed {args['seed']}" if 'seed' in args else ''
    tested_on = f'the {dataset.split} set ({dataset.split_of or dataset.title})'
    return (
        table(('form', 'input, px', 'top-1', 'top-5', 'measured by'), *rows)
        + f'\n\nAccuracy in percent on {tested_on}, for the weights of one run{seed}.')


def speed_section(rows: Sequence[Dict[str, str]]) -> str:
    if not rows:
        return 'Not measured.'
    times = [(row['form'], row['images_per_second'], f"{row['ms_low']} to {row['ms_high']}") for row in rows]
    setting = 'Batch size 1, {img_size} px, {threads} thread of {device}, {runtime}; the forms were timed in turns.'
    return table(('form', 'images per second', 'ms, quartiles'), *times) + '\n\n' + setting.format(**rows[0])


def licence_section(cfg: Dict[str, Any], dataset: Dataset, base: str) -> str:
    lines = ['The code of timm-finet is under Apache-2.0.']
    if not cfg['license']:
        lines.append('The owner has not stated a licence for these weights.')
    elif cfg['license'] != 'other':
        lines.append(f"These weights are under {cfg['license']}.")
    if dataset.terms:
        lines.append(
            f'The photographs of {dataset.title} {dataset.terms}: use these weights for research and teaching.')
    if base:
        lines.append(f'The terms of `{base}`, from which training began, apply to these weights too.')
    return ' '.join([*lines, 'Please cite the paper:'])
