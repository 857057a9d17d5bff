"""CIFAR held on the GPU, which crops, flips and normalises whole batches.

This is for networks that train faster than the host's loader can load images. `--dataset torch/cifar10_gpu
--no-prefetcher --workers 0` draws from the same distribution as `--dataset torch/cifar10_pad2`. In the same way,
`cifar100_gpu` replaces `cifar100_pad2`, `cifar10_first1000_gpu` replaces `cifar10_first1000`, and
`cifar100_first100_gpu` replaces `cifar100_first100`. Importing this module registers the names with timm.
"""
import numpy as np
import torch
from timm.data import dataset_factory
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map
from torchvision.transforms import CenterCrop, ColorJitter, Normalize, RandomHorizontalFlip, Resize

from .cifar import PAD, CIFAR10First1000, CIFAR10Pad2, CIFAR100First100, CIFAR100Pad2

__all__ = ['CIFAR10First1000GPU', 'CIFAR10GPU', 'CIFAR100First100GPU', 'CIFAR100GPU']


class Batch(tuple):
    """Images and labels that need no collation."""


# torch's own way to add a type that its loader can collate
default_collate_fn_map[Batch] = lambda batch, *, collate_fn_map=None: tuple(batch[0])


def changes_nothing(transform):
    """Whether a transform leaves a 32 px image unchanged."""
    if isinstance(transform, RandomResizedCropAndInterpolation):
        return tuple(transform.size) == (32, 32) and {*transform.scale, *transform.ratio} == {1}
    if isinstance(transform, ColorJitter):
        return not any((transform.brightness, transform.contrast, transform.saturation, transform.hue))
    if isinstance(transform, (Resize, CenterCrop)):
        return {*np.atleast_1d(transform.size)} == {32}
    return isinstance(transform, MaybeToTensor)


class _OnGPU:
    """Apply the transforms that timm sets for single images to whole batches on the device.

    Batches have the shape and dtype of those of timm's loader, float32 `(N, 3, 32, 32)`, and are normalised. Without a
    GPU, the device is the CPU.

    Raises:
        ValueError: At the first batch, if timm's prefetcher or loader workers are on, or if there are transforms other
            than crop, flip and normalisation.
    """

    images = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.has_workers = False

    def _set_up(self):
        if get_worker_info() is not None:
            raise ValueError('Images on the GPU need no loader workers: use --workers 0.')
        transforms = [t for t in self.transform.transforms if not changes_nothing(t)]
        self.flip = sum(t.p for t in transforms if isinstance(t, RandomHorizontalFlip))
        normalize = next((t for t in transforms if isinstance(t, Normalize)), None)
        if normalize is None:
            raise ValueError(
                'Images on the GPU are normalised there and need no prefetcher: use --no-prefetcher.')
        others = [type(t).__name__ for t in transforms if not isinstance(t, (RandomHorizontalFlip, Normalize))]
        if others:
            raise ValueError(
                f"{', '.join(others)} cannot be done on the GPU: switch it off, or use torch/{self.name}_pad2.")
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
        self.mean, self.std = (torch.as_tensor(v, device=device).view(3, 1, 1) for v in (normalize.mean, normalize.std))
        labels = self.targets if self.target_transform is None else [*map(self.target_transform, self.targets)]
        self.labels = torch.tensor(labels, device=device)
        self.images = torch.from_numpy(self.data).to(device)
        self.side = torch.arange(32, device=device)

    def __getitems__(self, indices):
        if self.images is None:
            self._set_up()
        draws = torch.zeros(4, len(indices), dtype=torch.int64)
        draws[0] = torch.tensor(indices)
        if self.train:
            draws[1:3].random_(2 * PAD + 1)
            draws[3] = torch.rand(len(indices)) < self.flip
        if self.side.is_cuda:
            draws = draws.pin_memory()  # a copy from other memory would wait for all work queued on the GPU
        index, top, left, flip = draws.to(self.side.device, non_blocking=True)[:, :, None]
        rows = top + self.side
        columns = left + torch.where(flip == 1, 31 - self.side, self.side)
        batch = self.images[index[:, :, None], rows[:, :, None], columns[:, None]]
        batch = batch.permute(0, 3, 1, 2).float().contiguous()
        return [Batch((batch.div_(255).sub_(self.mean).div_(self.std), self.labels[index[:, 0]]))]


class CIFAR10GPU(_OnGPU, CIFAR10Pad2):
    pass


class CIFAR100GPU(_OnGPU, CIFAR100Pad2):
    pass


class CIFAR10First1000GPU(_OnGPU, CIFAR10First1000):
    pass


class CIFAR100First100GPU(_OnGPU, CIFAR100First100):
    pass


dataset_factory._TORCH_BASIC_DS.update(
    cifar10_gpu=CIFAR10GPU, cifar100_gpu=CIFAR100GPU, cifar10_first1000_gpu=CIFAR10First1000GPU,
    cifar100_first100_gpu=CIFAR100First100GPU)
