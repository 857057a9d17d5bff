"""CIFAR with the paper's padded crop, through timm's dataset and loader factories."""
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.utils import random_seed

import timm_finet  # names the data sets

IMAGES = np.random.default_rng(0).integers(1, 256, (20, 32, 32, 3), dtype=np.uint8)  # no zeros: those are padding
LABELS = np.arange(20, dtype=np.uint8) % 10
TEST_IMAGES, TEST_LABELS = 255 - IMAGES // 2, (LABELS[:12] + 3) % 10  # other ones, and fewer
SPLITS = {'train': (IMAGES, LABELS), 'validation': (TEST_IMAGES[:12], TEST_LABELS)}
ARCHIVE = dict(train=IMAGES, train_labels=LABELS, test=TEST_IMAGES[:12], test_labels=TEST_LABELS)


@pytest.fixture(params=['archive', 'file', 'folder', 'torchvision'])
def root(request, tmp_path, monkeypatch):
    """Twenty training and twelve test images in every place that the dataset reads."""
    if request.param in ('archive', 'file'):
        path = tmp_path / 'cifar10.npz'
        np.savez(path, **ARCHIVE)
        return tmp_path if request.param == 'archive' else path
    if request.param == 'folder':
        for split, (images, labels) in SPLITS.items():
            for i, (image, label) in enumerate(zip(images, labels)):
                (tmp_path / split / f'class{label}').mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(tmp_path / split / f'class{label}' / f'{i:02}.png')
        return tmp_path
    from timm_finet.data import CIFAR10Pad2
    folder = tmp_path / CIFAR10Pad2.base_folder
    folder.mkdir()
    monkeypatch.setattr(CIFAR10Pad2, '_check_integrity', lambda self: True)
    monkeypatch.setattr(CIFAR10Pad2, 'train_list', [('train', '')])
    monkeypatch.setattr(CIFAR10Pad2, 'test_list', [('test', '')])
    monkeypatch.setattr(CIFAR10Pad2, '_load_meta', lambda self: None)
    for name, (images, labels) in zip(('train', 'test'), SPLITS.values()):
        batch = dict(data=images.transpose(0, 3, 1, 2).reshape(len(images), -1), labels=labels.tolist())
        (folder / name).write_bytes(pickle.dumps(batch))
    return tmp_path


@pytest.mark.parametrize('split', SPLITS)
def test_every_source_gives_the_same_images(split, root):
    data = create_dataset('torch/cifar10_pad2', root=str(root), split=split)
    images = data.data[:, 2:-2, 2:-2] if split == 'train' else [np.asarray(image) for image, _ in data]
    pairs = sorted((int(label), image.tobytes()) for image, label in zip(images, data.targets, strict=True))
    assert pairs == sorted((int(label), image.tobytes()) for image, label in zip(*SPLITS[split]))
    assert data.targets == [label for _, label in data]


def test_images_and_labels_of_every_source_are_transformed_where_that_is_asked_for(root):
    for split, (images, labels) in SPLITS.items():
        data = create_dataset(
            'torch/cifar10_pad2', root=str(root), split=split, transform=lambda image: image.size,
            target_transform=lambda label: -label)
        assert sorted(label for _, label in data) == sorted((-labels.astype(int)).tolist())
        assert {size for size, _ in data} == {(32, 32)} and len(data) == len(images)


def test_training_crops_are_shifts_of_the_zero_padded_image(tmp_path):
    np.savez(tmp_path / 'cifar10.npz', **ARCHIVE)
    data = create_dataset('torch/cifar10_pad2', root=str(tmp_path), split='train')
    padded = np.pad(IMAGES[3], ((2, 2), (2, 2), (0, 0)))
    crops = {(y, x): padded[y:y + 32, x:x + 32].tobytes() for y in range(5) for x in range(5)}
    seen = {np.asarray(data[3][0]).tobytes() for _ in range(400)}
    assert seen == set(crops.values())


def test_timms_loader_normalises_crops_and_flips(tmp_path):
    np.savez(tmp_path / 'cifar10.npz', **ARCHIVE)
    data = create_dataset('torch/cifar10_pad2', root=str(tmp_path), split='train')
    loader = create_loader(
        data, (3, 32, 32), 20, is_training=True, use_prefetcher=False, scale=(1, 1), ratio=(1, 1), hflip=1.,
        color_jitter=0, interpolation='bilinear', mean=(0.5,) * 3, std=(0.25,) * 3, num_workers=0,
        persistent_workers=False)
    batch, labels = next(iter(loader))
    pixels = (batch * 0.25 + 0.5).mul(255).round().numpy().astype(np.uint8).transpose(0, 2, 3, 1)[:, :, ::-1]
    for image, label in zip(pixels, labels):
        sources = [np.pad(IMAGES[i], ((2, 2), (2, 2), (0, 0))) for i in np.flatnonzero(LABELS == label.item())]
        assert any(
            np.array_equal(image, s[y:y + 32, x:x + 32]) for s in sources for y in range(5) for x in range(5))


def test_missing_data_names_the_ways_out(tmp_path):
    with pytest.raises(FileNotFoundError, match='cifar-100-python.*cifar100.npz.*train and validation'):
        create_dataset('torch/cifar100_pad2', root=str(tmp_path), split='train')


@pytest.mark.parametrize('name, count', [('cifar10_first1000', 1000), ('cifar100_first100', 100)])
def test_parts_hold_the_first_images_of_each_class_and_all_test_images(name, count, tmp_path):
    classes = 10 if name.startswith('cifar10_') else 100
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), count + 3)).astype(np.uint8)
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(len(labels)) // 256, np.arange(len(labels)) % 256
    np.savez(tmp_path / f"{name.split('_')[0]}.npz", train=images, train_labels=labels, test=images[:7],
             test_labels=labels[:7])
    train, test = (
        create_dataset(f'torch/{name}', root=str(tmp_path), split=split) for split in ('train', 'validation'))
    found = [int(image[2, 2, 0]) * 256 + int(image[2, 2, 1]) for image in train.data]
    seen = dict.fromkeys(range(classes), 0)
    expected = []
    for index, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= count:
            expected.append(index)
    assert found == expected and train.targets == labels[expected].tolist()
    assert len(test) == 7 and test.targets == labels[:7].tolist()


def test_shipped_sample_splits_the_images():
    train, validation = (create_dataset('torch/cifar10_sample', split=split) for split in ('train', 'validation'))
    assert [np.bincount(data.targets).tolist() for data in (train, validation)] == [[30] * 10, [10] * 10]
    assert not {p.tobytes() for p in train.data[:, 2:-2, 2:-2]} & {p.tobytes() for p in validation.data}


def test_photographs_are_timms_folder_turned(tmp_path):
    """The same classes in the same order, ten after nine; each file where a loader's other process reads it too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, name in enumerate(('10', '9')):
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (6, 4), (i, 0, 0)).save(tmp_path / 'val' / name / 'a.png', exif=exif)
    timms, ours = (create_dataset(name, str(tmp_path), 'validation') for name in ('', 'torch/photographs'))
    assert ours.reader.class_to_idx == timms.reader.class_to_idx == {'9': 0, '10': 1}
    assert ours.filenames() == timms.filenames()
    for (image, label), (sideways, same) in zip(pickle.loads(pickle.dumps(ours)), timms, strict=True):
        assert (image.size, sideways.size, label) == ((4, 6), (6, 4), same)
        assert image.tobytes() == sideways.transpose(Image.Transpose.ROTATE_270).tobytes()
    ours.transform = lambda image: image.size
    assert ours[0] == ((4, 6), 0)


def epochs(numbers, workers, seed=5):
    """The batches of some epochs, each after the numbers that a training run draws in between."""
    random_seed(seed)
    data = create_dataset('torch/cifar10_sample', split='train')
    loader = create_loader(
        data, (3, 32, 32), 100, is_training=True, use_prefetcher=False, scale=(1, 1), ratio=(1, 1), color_jitter=0,
        num_workers=workers)
    found = []
    for number in numbers:
        torch.rand(len(found) + 1), random.random(), np.random.rand()
        data.set_epoch(number)
        found.append(torch.cat([x.flatten() for batch in loader for x in batch]).numpy().tobytes())
    return found


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_repeats_exactly_whatever_came_before_it(workers):
    unbroken = epochs([0, 1, 2], workers)
    assert len(set(unbroken)) == 3 and epochs([2], workers) == unbroken[2:]
    assert epochs([2], workers, seed=6) != unbroken[2:]


def test_loader_workers_draw_crops_of_their_own(monkeypatch):
    """Those of one would be those of all, for the first batch of each."""
    monkeypatch.setattr(torch.utils.data, 'RandomSampler', torch.utils.data.SequentialSampler)
    random_seed(5)
    data = create_dataset('torch/cifar10_sample', split='train')
    data.data[:] = data.data[0]
    loader = create_loader(
        data, (3, 32, 32), 100, is_training=True, use_prefetcher=False, scale=(1, 1), ratio=(1, 1), color_jitter=0,
        hflip=0, num_workers=2)
    data.set_epoch(0)
    first, second, _ = (x for x, _ in loader)
    assert not torch.equal(first, second)


def test_several_processes_leave_the_epoch_to_the_sampler(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert not hasattr(create_dataset('torch/cifar10_sample', split='train'), 'set_epoch')


def test_the_training_images_are_the_default_and_nothing_is_downloaded(tmp_path):
    np.savez(tmp_path / 'cifar10.npz', train=np.zeros((3, 32, 32, 3), np.uint8), train_labels=[1, 2, 3],
             test=np.zeros((1, 32, 32, 3), np.uint8), test_labels=[0])
    assert timm_finet.data.CIFAR10Pad2(tmp_path).targets == [1, 2, 3]
    with pytest.raises(FileNotFoundError, match='cifar10.npz'):
        timm_finet.data.CIFAR10Pad2(tmp_path / 'elsewhere')


def test_the_download_is_torchvisions_where_it_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr('torchvision.datasets.CIFAR10.download', lambda data: asked.append(data))
    with pytest.raises(FileNotFoundError):  # as nothing came
        timm_finet.data.CIFAR10Pad2(tmp_path, download=True)
    assert len(asked) == 1
