"""Model repositories for the Hugging Face Hub: read a checkpoint, write its card, push both as one commit."""
import csv
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter is httpx's, under whatever name that has
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model_in_modules, list_models, load_state_dict, save_for_hf
from timm.models._input import get_model_args
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from .fbn import FBNConv2d
from .finet import CIFAR10_CLASSES, Finet
from .flops import count_flops
from .pretrained import UNTRAINED
from .rewrite import fuse_fbn

__all__ = ['load_checkpoint', 'make_card', 'push', 'push_checkpoint', 'read_results', 'save']

MODULES = ['finet', 'resnet_fbn']
BLOCK = Path(__file__).parents[1] / 'scripts' / 'results' / 'block.png'  # there in a checkout of the source alone
LOCAL_ARGS = ('config', 'data', 'data_dir', 'experiment', 'initial_checkpoint', 'output', 'pretrained_path', 'resume')
RECIPE = (
    'epochs', 'batch_size', 'opt', 'lr', 'sched', 'warmup_epochs', 'momentum', 'weight_decay', 'smoothing', 'drop', 'mixup',
    'cutmix', 'aa', 'pretrained', 'model_ema', 'amp')

# By tag, and by train.py's --dataset: the Hub's name, the usual name, the classes.
CIFAR10, CIFAR100 = ('cifar10', 'CIFAR-10', CIFAR10_CLASSES), ('cifar100', 'CIFAR-100', None)
IMAGENET = ('imagenet-1k', 'ImageNet-1k', None)
DATASETS = {
    'cifar10': CIFAR10, 'torch/cifar10': CIFAR10, 'torch/cifar10_pad2': CIFAR10,
    'cifar100': CIFAR100, 'torch/cifar100': CIFAR100, 'torch/cifar100_pad2': CIFAR100,
    'in1k': IMAGENET, 'torch/imagenet': IMAGENET,
}
UNKNOWN_DATASET = ('imagefolder', 'the owner\'s pictures', None)

BODY = '''
# {name}

{architecture} is an image classifier: {family} use Fine-grained Batch Normalization (FBN,
[arXiv 2005.06828](https://arxiv.org/abs/2005.06828)) with G = {groups}. FBN splits a convolution's input into G groups,
batch-normalises each group's partial sum and adds them up; for inference all of it folds into one plain convolution. These
weights are in {form}.
{block}
| | train form | fused, for inference |
|---|---|---|
| parameters | {params[0]:,} | {params[1]:,} |
| multiply-adds at {size} | {macs[0]:,} | {macs[1]:,} |

A multiply-add counts as one; convolutions and linear layers, by fvcore (`timm_finet.flops`).

## Usage

```python
import timm_finet  # registers the network with timm
import timm
import torch
from PIL import Image

model = timm.create_model('{source}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
picture = Image.open('picture.png').convert('RGB')
with torch.inference_mode():
    probabilities, classes = model(transform(picture)[None]).softmax(1)[0].topk({top})
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

Trained on {dataset} at {size}: it knows these {num_classes} classes and no others, and is no better than its training pictures.
One run gives one figure; other seeds will differ. {choice}The fused form cannot be trained further with batch statistics.

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


PICTURE = f'''
![A block in train and in fused form]({BLOCK.name})

The picture shows finet_large_se_g4; the others differ in width, in G, and in the right column, Squeeze-and-Excitation.
'''


def load_checkpoint(checkpoint: str, name: str) -> Tuple[nn.Module, Dict[str, Any]]:
    """The network of a checkpoint of train.py (its EMA, where it has one) or of a plain state dict, in the form it is in.

    Args:
        checkpoint: Its training arguments, in it or in `args.yaml` beside it, tell how the network is built and fed.
        name: The network; its tag, or the lack of one, tells the same where there are no such arguments.

    Returns:
        The network, whose `pretrained_cfg` describes these weights, and the training arguments without local paths.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name is unknown, or the file is not a checkpoint of it.
    """
    path, architecture = Path(checkpoint), name.split('.')[0]
    if not path.is_file():
        raise FileNotFoundError(f'CHECKPOINT={checkpoint!r} does not exist.')
    if not is_model_in_modules(architecture, MODULES):
        raise ValueError(f"--model {name!r} is unknown: use one of {', '.join(list_models(module=MODULES))}.")
    try:
        weights = load_state_dict(str(path))
        args = training_args(path)
    except Exception as error:  # whatever torch and safetensors raise for a file that is none of theirs
        raise ValueError(f'CHECKPOINT={checkpoint!r} cannot be read: {one_line(error)}') from error
    cfg, built_as = get_pretrained_cfg(architecture), args.get('model', name)
    try:
        model = timm.create_model(
            built_as, pretrained=args.get('pretrained', False), num_classes=len(weights[f'{cfg.classifier}.weight']),
            in_chans=weights[f'{cfg.first_conv}.weight'].shape[1], global_pool=args.get('gp'),
            **args.get('model_kwargs') or {}).eval()
        if model.pretrained_cfg['architecture'] != architecture:
            raise RuntimeError(f'it was trained as {built_as}.')
        if not any(key.endswith('running_var') for key in weights):
            model = fuse_fbn(model, inplace=True)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f'CHECKPOINT={checkpoint!r} does not fit --model {name}: {one_line(error)}') from error
    describe(model, args)
    return model, {key: value for key, value in args.items() if key not in LOCAL_ARGS}


def one_line(error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f'{text[:200]} ...'


def training_args(path: Path) -> Dict[str, Any]:
    if path.suffix != '.safetensors':
        args = load_checkpoint_metadata(path).get('args')
        if args is not None:
            return vars(args)
    beside = path.with_name('args.yaml')
    return yaml.safe_load(beside.read_text()) if beside.is_file() else {}


def describe(model: nn.Module, args: Dict[str, Any]) -> None:
    """Make `model.pretrained_cfg`, which came with the name, that of the weights trained with `args`."""
    cfg = dict(model.pretrained_cfg)
    data = resolve_data_config(args, model=model)
    data['input_size'] = (model.in_chans, *data['input_size'][1:])
    if data['input_size'] != cfg['input_size']:
        data['pool_size'] = None
    cfg.update(data, num_classes=model.num_classes)
    if args:
        _, title, classes = DATASETS.get(args.get('dataset'), UNKNOWN_DATASET)
        cfg.update(
            tag=None, notes=None, description=f'trained on {title}',
            label_names=classes if classes and len(classes) == model.num_classes else None)
    elif cfg['tag'] == UNTRAINED:
        cfg['tag'] = None
    model.pretrained_cfg = model.default_cfg = cfg


def read_results(file: str, name: str) -> List[Dict[str, str]]:
    """The rows of a results file for one network: at least `model`, `top1` and `top5`, as timm's validate.py writes them.

    Raises:
        ValueError: It lacks these columns, or such rows.
    """
    with open(file, newline='') as lines:
        rows = list(csv.DictReader(lines))
    missing = {'model', 'top1', 'top5'} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"--results {file!r} lacks the columns {', '.join(sorted(missing))}.")
    found = [row for row in rows if row['model'] == name]
    if not found:
        raise ValueError(f"--results {file!r} has no row for {name!r}: it has {', '.join(sorted({r['model'] for r in rows}))}.")
    return found


def make_card(
        model: nn.Module, name: str, source: str, results: Sequence[Dict[str, str]] = (), args: Optional[Dict[str, Any]] = None,
        log: Optional[str] = None, speed: Sequence[Dict[str, str]] = ()) -> ModelCard:
    """The model card. Its figures come from the network and from the results and the log that are given.

    Args:
        model: In either form; its `pretrained_cfg` describes the weights.
        name: Title of the card.
        source: What `timm.create_model` loads: a name with a tag, or `hf-hub:ORG/NAME`.
        results: Rows of a results file, one a form.
        args: The training arguments.
        log: Path of train.py's summary.csv.
        speed: Rows of results/weights_speed.csv.
    """
    args, cfg = args or {}, model.pretrained_cfg
    model_args = get_model_args(model)
    twin = timm.create_model(cfg['architecture'], **{**model_args, 'fused': False}).eval()
    counts = [count_flops(network, cfg['input_size']) for network in (twin, fuse_fbn(twin))]
    groups = sorted({m.fbn_groups for m in twin.modules() if isinstance(m, FBNConv2d)})
    hub_dataset, dataset, _ = DATASETS.get(cfg.get('tag') or args.get('dataset'), UNKNOWN_DATASET)
    is_known = hub_dataset != UNKNOWN_DATASET[0]
    if not is_known and cfg.get('description'):
        dataset = cfg['description'].removeprefix('trained on ')
    form = 'fused' if model_args['fused'] else 'train'

    metrics = [row for row in results if row.get('form', form) == form]
    if len(metrics) > 1:
        raise ValueError(f'results has {len(metrics)} rows for {name} in {form} form: one is needed.')
    evaluations = [
        EvalResult(
            task_type='image-classification', dataset_type=hub_dataset, dataset_name=dataset, dataset_split='test',
            metric_type='accuracy', metric_name=title, metric_value=float(row[column]))
        for row in metrics for column, title in (('top1', 'Top-1 accuracy'), ('top5', 'Top-5 accuracy'))]
    data = ModelCardData(
        model_name=name, library_name='timm', pipeline_tag='image-classification', license=cfg['license'],
        tags=['image-classification', 'timm', 'finet', 'fine-grained-batch-normalization', 'arxiv:2005.06828'],
        datasets=[hub_dataset] if is_known else None, eval_results=evaluations or None)

    body = BODY.format(
        name=name, source=source, architecture=cfg['architecture'], dataset=dataset, num_classes=model.num_classes,
        groups=', '.join(map(str, groups)),
        family='a light-weight Finet, whose 1x1 convolutions' if isinstance(model, Finet) else 'a ResNet, whose convolutions',
        form='train form' if form == 'train' else 'fused form, for inference', top=min(5, model.num_classes),
        block=PICTURE if isinstance(model, Finet) and BLOCK.is_file() else '',
        params=[count['params'] for count in counts], macs=[count['conv'] + count['linear'] for count in counts],
        size='x'.join(map(str, cfg['input_size'])),
        choice='' if not isinstance(model, Finet) else (
            "The paper gives no code: its parameter counts are reproduced exactly, but where a block's second\nReLU stands is a "
            'choice of this implementation (`act_place`). '),
        fuse='' if form == 'fused' else '\nFor inference, fold all normalisation away: `model = timm_finet.fuse_fbn(model)`.\n',
        training=training_section(cfg, args, dataset, log), accuracy=accuracy_section(results, dataset, args),
        speed=speed_section(speed),
        licence=f"{cfg['license']}. Please cite the paper:")
    return ModelCard(f'---\n{data.to_yaml()}\n---\n{body}')


def training_section(cfg, args, dataset, log) -> str:
    lines = [f'Data set: {dataset}. ' + (
        "Arguments of timm's train.py, the rest of which is in [args.yaml](args.yaml):" if args
        else 'The training arguments were not recorded.')]
    settings = [key for key in RECIPE if args.get(key)]
    if settings:
        lines += ['', '| ' + ' | '.join(settings) + ' |', '|' + '---|' * len(settings),
                  '| ' + ' | '.join(str(args[key]) for key in settings) + ' |']
    if log:
        with open(log, newline='') as rows:
            last = list(csv.DictReader(rows))[-1]
        lines += ['', f"Accuracy by epoch is in [summary.csv](summary.csv); it ends at epoch {last['epoch']} with "
                      f"{last['eval_top1']}% top-1."]
    for note in cfg.get('notes') or ():
        lines += ['', note]
    return '\n'.join(lines)


def accuracy_section(results, dataset, args) -> str:
    if not results:
        return 'Not measured apart from the training log.'
    lines = ['| form | top-1 | top-5 | measured by |', '|---|---|---|---|']
    lines += [f"| {row.get('form', '')} | {row['top1']} | {row['top5']} | `{row.get('command', 'validate.py of timm')}` |"
              for row in results]
    seed = f", seed {args['seed']}" if 'seed' in args else ''
    return '\n'.join(lines + ['', f'Percent of the test set ({dataset}), weights of one run{seed}.'])


def speed_section(rows) -> str:
    if not rows:
        return 'Not measured.'
    lines = ['| form | pictures a second | ms, quartiles |', '|---|---|---|']
    lines += [f"| {row['form']} | {row['images_per_second']} | {row['ms_low']} to {row['ms_high']} |" for row in rows]
    lines += ['', 'Batch 1, {threads} thread of {device}, {runtime}, the forms in turns.'.format(**rows[0])]
    return '\n'.join(lines)


def save(
        model: nn.Module, folder: str, card: ModelCard, args: Optional[Dict[str, Any]] = None, log: Optional[str] = None) -> None:
    """Write a model repository: timm's config.json and model.safetensors, the card, training arguments and log."""
    save_for_hf(model, folder, safe_serialization=True)
    folder = Path(folder)
    card.save(folder / 'README.md')
    if args:
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    if log:
        shutil.copyfile(log, folder / 'summary.csv')
    if BLOCK.name in card.text:
        shutil.copyfile(BLOCK, folder / BLOCK.name)


def push(folder: str, repo_id: str, private: bool = False, revision: Optional[str] = None) -> str:
    """Push a folder of `save` as one commit, or none where nothing differs, as timm's `push_to_hf_hub` does.

    timm's function would write its own card, in a repository that has none, or keep the old one.

    Returns:
        The address of the commit.

    Raises:
        RuntimeError: No token, no right to the repository, or no network. The repository is as it was, or new and empty.
    """
    if not get_token():
        raise RuntimeError('There is no token for the Hub: run `hf auth login`, or set HF_TOKEN.')
    api = HfApi(library_name='timm', library_version=timm.__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message='Add model').commit_url
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status == 401:
            reason = 'the token is not valid: run `hf auth login`, or set HF_TOKEN'
        elif status in (403, 404):
            reason = 'the token has no right to write to it'
        elif status is None:
            reason = f'{constants.ENDPOINT} cannot be reached or broke off ({one_line(error)})'
        else:
            reason = one_line(error)
        raise RuntimeError(f'--repo-id {repo_id}: {reason}. A push is one commit or none: push again.') from error


def push_checkpoint(
        checkpoint: str, name: str, repo_id: str, private: bool = False, revision: Optional[str] = None, fused: bool = False,
        results: Optional[str] = None, dry_run: bool = False) -> None:
    """`timm-finet push`: a checkpoint with its card, training arguments and log; a dry run prints what it would push."""
    if repo_id.count('/') != 1:
        raise ValueError(f'--repo-id {repo_id!r} must be ORG/NAME.')
    model, args = load_checkpoint(checkpoint, name)
    if fused:
        model = fuse_fbn(model, inplace=True)
    elif get_model_args(model)['fused']:
        raise ValueError(f'CHECKPOINT={checkpoint!r} is in fused form: add --fused to push it.')
    log = Path(checkpoint).with_name('summary.csv')
    log = log if log.is_file() else None
    rows = read_results(results, name) if results else []
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')
    with TemporaryDirectory() as folder:
        save(model, folder, make_card(model, name, source, rows, args, log), args, log)
        if not dry_run:
            print(push(folder, repo_id, private, revision))
            return
        print((Path(folder) / 'README.md').read_text())
        print(f'Would push to {repo_id}' + (f', branch {revision}' if revision else '') + ':')
        for file in sorted(Path(folder).iterdir()):
            print(f'{file.stat().st_size:>12,}  {file.name}')
