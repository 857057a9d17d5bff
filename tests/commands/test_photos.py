"""Packed photographs: what timm reads back, what is refused, and what the experiments on them run."""
import csv
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_dataset

from scripts.report import write_rows
from scripts.weights import embed_weights, photos, train_photos, transfer
from timm_finet.commands import run as launch

GOLDFISH, BULLFROG = 'n01443537', 'n01641577'


def image(level, mode='RGB'):
    file = io.BytesIO()
    Image.new(mode, (64, 64), level if mode == 'L' else (level, 0, 0)).save(file, 'JPEG')
    return file.getvalue()


def level(image):
    """Red, to the ten, as JPEG loses some."""
    return np.asarray(image)[..., 0].mean().round(-1)


@pytest.fixture
def source(tmp_path):
    """Tiny-ImageNet's layout: two classes of three and two images, the first of them gray."""
    files = {
        f'train/{GOLDFISH}/images/{GOLDFISH}_10.JPEG': image(90),
        f'train/{GOLDFISH}/images/{GOLDFISH}_2.JPEG': image(60),
        f'train/{GOLDFISH}/images/{GOLDFISH}_1.JPEG': image(30, 'L'), f'train/{GOLDFISH}/{GOLDFISH}_boxes.txt': b'',
        f'train/{BULLFROG}/images/{BULLFROG}_0.JPEG': image(200),
        f'train/{BULLFROG}/images/{BULLFROG}_1.JPEG': image(230),
        'val/images/val_0.JPEG': image(210), 'val/images/val_1.JPEG': image(120),
        'test/images/test_0.JPEG': image(0),
        'val/val_annotations.txt': f'val_0.JPEG\t{BULLFROG}\t0\t0\nval_1.JPEG\t{GOLDFISH}\t0\t0\n'.encode()}
    for path, data in files.items():
        path = tmp_path / 'source' / 'tiny' / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / 'source'


def pack(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['photos.py', *map(str, args)])
    photos.main()


def read(folder, split):
    return create_dataset('', root=str(folder), split=f'{split}.tar')


def test_timm_reads_images_and_labels_back(source, tmp_path, monkeypatch):
    pack(monkeypatch, source, tmp_path / 'pack')
    train, validation = (read(tmp_path / 'pack', split) for split in ('train', 'validation'))
    found = [(image.mode, image.size, target, level(image)) for image, target in train]
    assert found == [('RGB', (64, 64), 0, 30), ('RGB', (64, 64), 0, 60), ('RGB', (64, 64), 0, 90),
                     ('RGB', (64, 64), 1, 200), ('RGB', (64, 64), 1, 230)]
    gray = np.asarray(train[0][0])
    assert (gray[..., 0] == gray[..., 2]).all()
    assert [(target, level(image)) for image, target in validation] == [(0, 120), (1, 210)]
    assert train.reader.class_name_to_idx == validation.reader.class_name_to_idx == {GOLDFISH: 0, BULLFROG: 1}
    assert (tmp_path / 'pack' / 'classes.txt').read_text() == f'{GOLDFISH}\tgoldfish\n{BULLFROG}\tbullfrog\n'


def test_counts_are_those_of_the_pack(source, tmp_path, monkeypatch):
    pack(monkeypatch, source, tmp_path / 'pack')
    with (tmp_path / 'pack' / 'pack.csv').open(newline='') as file:
        train, validation = csv.DictReader(file)
    assert (train['images'], train['classes'], train['per_class']) == ('5', '2', '2 to 3')
    assert (train['sizes'], train['modes']) == ('64x64:5', 'RGB:4 L:1')
    dataset = read(tmp_path / 'pack', 'validation')
    lines = ''.join(
        f'{hashlib.sha256(dataset.reader[i][0].read()).hexdigest()}  {dataset.filename(i)}\n'
        for i in range(len(dataset)))
    assert validation['sha256_of_list'] == hashlib.sha256(lines.encode()).hexdigest()


def test_broken_image_is_named_and_leaves_no_tar(source, tmp_path, monkeypatch, capsys):
    broken = source / 'tiny' / 'train' / BULLFROG / 'images' / f'{BULLFROG}_1.JPEG'
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(SystemExit) as stop:
        pack(monkeypatch, source, tmp_path / 'pack')
    assert stop.value.code == 2 and f'{BULLFROG}_1.JPEG is not an image' in capsys.readouterr().err
    assert not list((tmp_path / 'pack').iterdir())


def test_splits_with_different_classes_are_refused(source, tmp_path, monkeypatch, capsys):
    (source / 'tiny' / 'val' / 'val_annotations.txt').write_text(f'val_0.JPEG\t{BULLFROG}\nval_1.JPEG\t{BULLFROG}\n')
    with pytest.raises(SystemExit) as stop:
        pack(monkeypatch, source, tmp_path / 'pack')
    assert stop.value.code == 2 and f'these are in only one: {GOLDFISH}.' in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        pack(monkeypatch, source / 'tiny' / 'test', tmp_path / 'pack')
    assert stop.value.code == 2 and 'holds no folder `train`' in capsys.readouterr().err


def test_all_but_variances_are_halved():
    model = timm.create_model('finet_small_se_g4', num_classes=5)
    model.stages[0][0].conv_dw.bn.running_var.fill_(1e6)  # which float16 cannot hold
    state = embed_weights.halve(model.state_dict())
    assert state['classifier.weight'].dtype == state['stages.0.0.conv_dw.bn.running_mean'].dtype == torch.float16
    model.load_state_dict(state)
    assert model.stages[0][0].conv_dw.bn.running_var.eq(1e6).all() and model.classifier.weight.dtype == torch.float32


def test_embedding_writes_file_sum_and_names_or_nothing(tmp_path, monkeypatch):
    state = {'weight': torch.ones(100, 100).half()}
    embed_weights.embed(state, 'net.tag', ['cat', 'dog'], tmp_path)
    file = tmp_path / 'net.tag.safetensors'
    assert file.stat().st_mode & 0o777 == 0o644
    assert load_file(file)['weight'].equal(state['weight']) and (tmp_path / 'tag.txt').read_text() == 'cat\ndog\n'
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (tmp_path / 'SHA256SUMS').read_text() == f'{digest}  net.tag.safetensors\n'
    monkeypatch.setattr(embed_weights, 'ROOM', 30_000)
    with pytest.raises(ValueError, match='net.other would make'):
        embed_weights.embed(state, 'net.other', [], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['SHA256SUMS', 'net.tag.safetensors', 'tag.txt']


def test_a_run_is_recorded_without_this_machines_paths(tmp_path):
    (tmp_path / 'summary.csv').write_text('epoch,eval_top1\n0,5\n')
    embed_weights.record(tmp_path / 'last.pth.tar', 'net.tag', dict(lr=0.1, data_dir='/home/me'), tmp_path)
    assert yaml.safe_load((tmp_path / 'net.tag.yaml').read_text()) == dict(lr=0.1)
    assert (tmp_path / 'net.tag.csv').read_text() == 'epoch,eval_top1\n0,5\n'


def test_phases_are_plotted_one_behind_the_other(tmp_path, monkeypatch):
    figure = pytest.importorskip('matplotlib.figure', reason='matplotlib is missing: install the extra plots').Figure
    (tmp_path / 'runs').mkdir()
    for phase in ('64px', '96px'):
        curve = tmp_path / 'runs' / f'photos-finet_small-{phase}-seed0.csv'
        curve.write_text('epoch,eval_top1\n0,10\n1,20\n')
    shown = []
    monkeypatch.setattr(figure, 'savefig', lambda self, *_, **__: shown.extend(self.axes[0].lines))
    write_rows(tmp_path / 'runs.csv', [
        dict(setting=f'photos finet_small {phase}', seed=seed)
        for phase, seed in (('64px', '0'), ('96px', '0'), ('128px', '1'))])
    train_photos.plot(tmp_path / 'runs.csv')
    assert [list(line.get_xdata()) for line in shown] == [[1, 2], [3, 4]]


def test_from_scratch_leaves_out_the_weights_alone():
    args = transfer.without_pretrained('finetune')
    recipe = yaml.safe_load(Path(launch.find_recipe('recipe:finetune')).read_text())
    assert recipe.pop('pretrained') is True and '--pretrained' not in args
    assert {arg[2:].replace('-', '_') for arg in args if arg.startswith('--')} == set(recipe)
    assert args[args.index('--scale'):][:3] == ['--scale', '0.35', '1'] and None not in recipe.values()
    tuned, scratch = (
        transfer.setting('set', 'finet_small_g4.cifar10', start).args for start in ('fine-tuned', 'from scratch'))
    assert tuned[:2] == ('--config', 'recipe:finetune') and scratch[-len(tuned) + 2:] == tuned[2:]


def test_cifar_is_packed_without_its_padding(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {split: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for split, n in (('train', 30), ('test', 20))}
    np.savez(tmp_path / 'cifar10.npz', **arrays, train_labels=np.arange(30) % 10, test_labels=np.arange(20) % 10)
    transfer.pack_cifar(str(tmp_path), tmp_path / 'pack', train=20)
    for split, name in (('train', 'train'), ('validation', 'test')):
        dataset = read(tmp_path / 'pack', split)
        assert [target for _, target in dataset] == sorted([*range(10)] * 2)
        places = [int(Path(name).stem) for name in dataset.filenames()]
        assert sorted(places) == [*range(20)]
        assert all(np.array_equal(arrays[name][i], image) for i, (image, _) in zip(places, dataset))


def test_only_training_images_of_imagenette_are_left_out(source, tmp_path):
    transfer.pack_imagenette(source, tmp_path / 'pack', per_class=1)
    names = [f'{GOLDFISH}/{GOLDFISH}_1.JPEG', f'{BULLFROG}/{BULLFROG}_0.JPEG']
    assert read(tmp_path / 'pack', 'train').filenames() == names
    assert read(tmp_path / 'pack', 'validation').filenames() == [f'{GOLDFISH}/val_1.JPEG', f'{BULLFROG}/val_0.JPEG']


def test_folder_that_is_not_imagenette_is_named(tmp_path):
    with pytest.raises(ValueError, match=f'--imagenette={tmp_path}/none must hold folders `train` and `val`'):
        transfer.pack_imagenette(tmp_path / 'none', tmp_path / 'pack')
    assert not list(tmp_path.iterdir())


def test_transfer_table_tells_starts_apart():
    rows = [
        dict(setting=transfer.setting('set', 'net.tag', start).name, seed=seed, top1_last=top1, top1_best='60')
        for start, seed, top1 in (
            ('fine-tuned', '0', '58'), ('fine-tuned', '1', '60'), ('from scratch, higher rate', '0', '40'))]
    assert transfer.table(rows).splitlines()[2:] == [
        '| set | `net.tag` | fine-tuned | 59.00 ± 1.41 | 60.00 ± 0.00 | 0, 1 |',
        '| set | `net.tag` | from scratch, higher rate | 40.00 | 60.00 | 0 |']
