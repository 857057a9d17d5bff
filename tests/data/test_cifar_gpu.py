"""CIFAR held on the GPU, or on the CPU where there is none, against timm's own loader of the same images."""
import numpy as np
import pytest
import torch
from timm.data import create_dataset, create_loader
from timm.utils import random_seed

import timm_finet  # noqa: F401  names the data sets

IMAGES = np.random.default_rng(0).integers(1, 256, (60, 32, 32, 3), dtype=np.uint8)  # no zeros: those are padding
LABELS = np.arange(60) % 10


@pytest.fixture
def root(tmp_path):
    np.savez(tmp_path / 'cifar10.npz', train=IMAGES, train_labels=LABELS, test=IMAGES, test_labels=LABELS)
    return str(tmp_path)


def loader(root, name='cifar10_gpu', training=True, **options):
    dataset = create_dataset(f'torch/{name}', root=root, split='train' if training else 'validation')
    return dataset, create_loader(dataset, **{**dict(
        input_size=(3, 32, 32), batch_size=25, is_training=training, use_prefetcher=False, num_workers=0,
        scale=(1, 1), ratio=(1, 1), color_jitter=0, interpolation='bilinear',
        crop_pct=1.0, mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616)), **options})


def pixels(batch):
    return batch.cpu().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


RAW = dict(mean=(0., 0., 0.), std=(1., 1., 1.))


def test_evaluation_equals_timms_loader(root):
    ours, timms = (list(loader(root, name, False)[1]) for name in ('cifar10_gpu', 'cifar10_pad2'))
    assert len(ours) == len(timms) == 3
    for (x, target), (y, label) in zip(ours, timms):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0 if x.is_cpu else 1e-6)
        assert torch.equal(target.cpu(), label)
        assert (x.dtype, target.dtype) == (y.dtype, label.dtype) and x.is_contiguous()


def test_labels_are_transformed_where_that_is_asked_for(root):
    dataset = create_dataset('torch/cifar10_gpu', root=root, split='validation', target_transform=lambda label: -label)
    batches = create_loader(dataset, (3, 32, 32), 60, use_prefetcher=False, num_workers=0, crop_pct=1.0)
    assert torch.cat([target for _, target in batches]).tolist() == (-LABELS).tolist()


def test_every_image_comes_once_an_epoch_in_another_order(root):
    _, batches = loader(root, batch_size=20, hflip=0., **RAW)
    epochs = []
    for _ in range(2):
        seen = []
        for x, target in batches:
            for image, label in zip(pixels(x), target):
                inner = image[4:28, 4:28]  # no padding reaches it
                match = [i for i in np.flatnonzero(LABELS == label.item()) if any(
                    np.array_equal(inner, IMAGES[i][y:y + 24, x:x + 24]) for y in range(2, 7) for x in range(2, 7))]
                assert len(match) == 1
                seen += match
        assert sorted(seen) == list(range(60))
        epochs.append(seen)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_last_batch_is_dropped_as_timm_does(root):
    for name in ('cifar10_gpu', 'cifar10_pad2'):
        _, batches = loader(root, name)
        assert len(batches) == 2 and [len(x) for x, _ in batches] == [25, 25]


def test_crops_and_flips_are_uniform(root):
    _, batches = loader(root, batch_size=60, **RAW)
    variants = {}
    for i, image in enumerate(IMAGES):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        for y in range(5):
            for x in range(5):
                crop = padded[y:y + 32, x:x + 32]
                variants[crop.tobytes()], variants[crop[:, ::-1].tobytes()] = (i, y, x, 0), (i, y, x, 1)
    assert len(variants) == 60 * 50
    counts = np.zeros((60, 5, 5, 2))
    for _ in range(50):
        ((x, target),) = batches
        for image, label in zip(pixels(x), target):
            found = variants[image.tobytes()]  # nothing else may come
            assert LABELS[found[0]] == label.item()
            counts[found] += 1
    assert (counts.sum((1, 2, 3)) == 50).all()
    counts, expected = counts.sum(0), 3000 / 50
    # chi-square of 49 degrees of freedom: above 85.4 once in a thousand; the seed is fixed
    assert ((counts - expected) ** 2 / expected).sum() < 85.4
    assert abs(counts[..., 1].sum() - 1500) < 4 * np.sqrt(750)


def test_normalisation_and_labels_are_timms(root):
    _, ours = loader(root, batch_size=60)
    _, timms = loader(root, 'cifar10_pad2', batch_size=60)
    ((x, target),), ((y, label),) = ours, timms
    assert sorted(target.tolist()) == sorted(label.tolist())
    black = -torch.tensor((0.4914, 0.4822, 0.4465)) / torch.tensor((0.2470, 0.2435, 0.2616))
    for batch in (x, y):
        low, high = batch.amin((0, 2, 3)).cpu(), batch.amax((0, 2, 3)).cpu()
        torch.testing.assert_close(low, black)  # the padding
        torch.testing.assert_close(high, black + 1 / torch.tensor((0.2470, 0.2435, 0.2616)))


def test_an_epoch_repeats_exactly_whatever_came_before_it(root):
    def epochs(numbers):
        random_seed(5)
        dataset, batches = loader(root)
        found = []
        for number in numbers:
            torch.rand(len(found) + 1)
            dataset.set_epoch(number)
            found.append(torch.cat([x.flatten() for batch in batches for x in batch]).cpu().numpy().tobytes())
        return found

    unbroken = epochs([0, 1, 2])
    assert len(set(unbroken)) == 3 and epochs([2]) == unbroken[2:]


@pytest.mark.parametrize('options, message', [
    (dict(use_prefetcher=True, device=torch.device('cpu')), '--no-prefetcher'),
    (dict(num_workers=1), '--workers 0'),
    (dict(auto_augment='rand-m5'), 'RandAugment.*torch/cifar10_pad2'),
    (dict(scale=(0.5, 1)), 'RandomResizedCrop.*torch/cifar10_pad2'),
    (dict(color_jitter=0.4), 'ColorJitter'),
    (dict(color_jitter=(0, 0, 0, 0.1)), 'ColorJitter'),
    (dict(input_size=(3, 48, 48)), 'RandomResizedCrop.*torch/cifar10_pad2'),
    (dict(training=False, crop_pct=0.875), 'Resize.*torch/cifar10_pad2'),
])
def test_what_it_cannot_do_is_refused(root, options, message):
    _, batches = loader(root, **options)
    with pytest.raises(ValueError, match=message):
        next(iter(batches))
