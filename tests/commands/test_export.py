"""`timm-finet export` as a user calls it. Tests of a runtime are skipped where it is not installed."""
import argparse
import json
import re
import sys
from ast import literal_eval
from importlib.util import find_spec

import pytest
import timm
import torch

from timm_finet import fuse_fbn
from timm_finet.commands import export
from timm_finet_cli import main
from timm_finet.data.datasets import CIFAR10
from timm_finet.images import TRAINING_IMAGES, shipped_images

NAME = 'finet_small_g4.cifar10'
RUNTIMES = [
    pytest.param('onnx', marks=pytest.mark.skipif(
        not find_spec('onnxruntime'), reason='onnxruntime is missing: install the extra export')),
    pytest.param('executorch', marks=pytest.mark.skipif(
        not find_spec('executorch'), reason='executorch is missing: install the extra executorch')),
]


@pytest.mark.parametrize('to', RUNTIMES)
def test_file_gives_pytorchs_answers(to, tmp_path, capsys):
    file = tmp_path / f'model{export.SUFFIXES[to]}'
    main(['export', NAME, '--to', to, '--output', str(file)])
    out = capsys.readouterr().out
    assert 'top-1 as in PyTorch: 100.00% of 400 test images' in out and 'input 1x3x32x32' in out
    assert [p.name for p in tmp_path.iterdir()] == [file.name] and 5 < file.stat().st_size / 2 ** 20 < 6
    x = torch.randn(1, 3, 32, 32)
    expected = timm.create_model(NAME, pretrained=True).eval()(x)
    torch.testing.assert_close(export.LOAD[to](str(file))(x), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('to', RUNTIMES)
def test_int8_file_is_small_and_stays_right(to, tmp_path, capsys):
    file = tmp_path / f'model{export.SUFFIXES[to]}'
    main(['export', NAME, '--to', to, '--int8', '--output', str(file)])
    before, after = re.search(r'right: ([\d.]+)% in PyTorch, ([\d.]+)% in the file', capsys.readouterr().out).groups()
    assert float(after) > float(before) - 3 and file.stat().st_size / 2 ** 20 < 2


@pytest.mark.parametrize('to', RUNTIMES[:1])
def test_any_number_of_images_at_a_time_in_int8_too(to, tmp_path, capsys):
    file = str(tmp_path / 'model.onnx')
    main(['export', NAME, '--to', to, '--int8', '--dynamic-batch', '--output', file])
    assert 'input Nx3x32x32' in capsys.readouterr().out
    run, x = export.LOAD[to](file), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(run(x), torch.cat([run(part) for part in x.split(1)]))
    import onnxruntime
    facts = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert (facts['imgsz'], facts['args']) == ('[32, 32]', "{'dynamic': True}")


@pytest.mark.parametrize('name', ['finet_small_se_g2', 'resnet18_fbn'])
def test_checkpoint_in_either_form(name, tmp_path, randomise):
    model, x = randomise(timm.create_model(name, num_classes=5)).eval(), torch.randn(1, 3, 32, 32)
    fused = fuse_fbn(model, x)
    for saved in (model, fused):
        torch.save({'state_dict': saved.state_dict()}, tmp_path / 'checkpoint.pth')
        built = export.build(name, str(tmp_path / 'checkpoint.pth'))
        torch.testing.assert_close(built(x), fused(x))


def test_other_networks_of_timm_are_built_fused(tmp_path, randomise):
    model = randomise(timm.create_model('mobilenetv3_small_050', num_classes=3)).eval()
    torch.save(model.state_dict(), tmp_path / 'checkpoint.pth')
    built = export.build('mobilenetv3_small_050', str(tmp_path / 'checkpoint.pth'))
    assert not any('running_var' in key for key in built.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def trained(tmp_path, randomise):
    """A function that writes what train.py leaves of a network of other classes, stem, size and mean than its name."""
    def save(**args):
        kwargs = dict(small_input=True, act_place='output')
        model = randomise(timm.create_model('finet_small_g4', num_classes=args.pop('num_classes', 10), **kwargs)).eval()
        args = dict(
            model='finet_small_g4', model_kwargs=kwargs, img_size=48, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], **args)
        file = tmp_path / 'last.pth.tar'
        torch.save(dict(
            state_dict=timm.create_model('finet_small_g4', num_classes=model.num_classes, **kwargs).state_dict(),
            state_dict_ema=model.state_dict(), args=argparse.Namespace(**args)), file)
        return file, model
    return save


def few_images(*args):
    return [part[:20] for part in shipped_images(*args)]


@pytest.fixture
def exported(monkeypatch, tmp_path):
    """`timm-finet export --to onnx` with PyTorch in place of the runtime: what was written, by name of its argument."""
    seen = {}

    def write(model, x, file, calibration, **options):
        seen.update(model=model, x=x, calibration=calibration, **options)
        open(file, 'w').close()
    monkeypatch.setitem(export.WRITE, 'onnx', write)
    monkeypatch.setitem(export.LOAD, 'onnx', lambda file: seen['model'])
    monkeypatch.setattr(export, 'shipped_images', few_images)

    def run(*args):
        main(['export', 'finet_small_g4', '--to', 'onnx', '--output', str(tmp_path / 'model.onnx'), *map(str, args)])
        return seen
    return run


def test_checkpoint_is_exported_as_it_was_trained(trained, exported, capsys):
    file, model = trained(dataset='torch/cifar10_pad2')
    seen = exported('--checkpoint', file)
    out = capsys.readouterr().out
    assert 'input 1x3x48x48, mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6), crop_pct 0.875 (center), interpolation b' in out
    assert 'right: ' in out
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(seen['model'](x), fuse_fbn(model)(x))  # the EMA's weights, in its stem and act_place


def test_size_may_be_another(trained, exported, capsys):
    file, _ = trained(dataset='')
    seen = exported('--checkpoint', file, '--img-size', 64)
    assert seen['x'].shape == (1, 3, 64, 64) and seen['metadata']['imgsz'] == '[64, 64]'
    assert 'input 1x3x64x64, mean (0.1, 0.2, 0.3)' in capsys.readouterr().out


def test_size_that_a_network_does_not_take_is_refused():
    name = 'vit_tiny_patch16_224'
    model = timm.create_model(name, depth=1)
    assert export.make_config(name, model, 224) == export.make_config(name, model)
    with pytest.raises(ValueError, match=rf'--img-size=96 does not fit {name}: .*requires \(224, 224\)'):
        export.make_config(name, model, 96)


def test_metadata_names_classes_or_numbers_them(trained, exported):
    file, _ = trained(dataset='', num_classes=3)
    metadata = exported('--checkpoint', file)['metadata']
    assert literal_eval(metadata['names']) == {0: '0', 1: '1', 2: '2'} and metadata['name'] == 'finet_small_g4'
    assert json.loads(metadata['mean']) == [0.1, 0.2, 0.3] and json.loads(metadata['std']) == [0.4, 0.5, 0.6]
    file, _ = trained(dataset='torch/cifar10_pad2')
    assert literal_eval(exported('--checkpoint', file)['metadata']['names']) == dict(enumerate(CIFAR10.classes))


@pytest.mark.parametrize('args', [dict(num_classes=3, dataset=''), dict(dataset='')])
def test_network_of_other_classes_is_not_scored_on_the_shipped_images(
        args, trained, exported, refused, tmp_path, capsys):
    file, _ = trained(**args)
    exported('--checkpoint', file)
    assert 'right: ' not in capsys.readouterr().out
    refused(
        ['export', 'finet_small_g4', '--to', 'onnx', '--int8', '--checkpoint', file],
        'calibration: give images that finet_small_g4')
    for i, tile in enumerate(shipped_images()[0][::10]):
        (tmp_path / 'train' / str(i % 3)).mkdir(parents=True, exist_ok=True)
        tile.save(tmp_path / 'train' / str(i % 3) / f'{i}.png')
    seen = exported('--checkpoint', file, '--int8', '--calibration', tmp_path / 'train')
    out = capsys.readouterr().out
    assert 'right: ' not in out and 'of 40 calibration images' in out and len(seen['calibration']) == 40


def test_calibration_takes_some_of_a_whole_training_set(trained, exported, tmp_path, monkeypatch):
    file, _ = trained(dataset='')
    for name in 'abcde':
        (tmp_path / 'train' / name).mkdir(parents=True)
        shipped_images()[0][0].save(tmp_path / 'train' / name / '0.png')
    monkeypatch.setattr(export, 'CALIBRATION', 3)
    assert len(exported('--checkpoint', file, '--int8', '--calibration', tmp_path / 'train')['calibration']) == 3


def test_interrupted_export_ends_in_one_line_and_leaves_no_file(cli, tmp_path, monkeypatch):
    def interrupt(model, x, file, calibration, **options):
        open(file, 'w').close()
        raise KeyboardInterrupt
    monkeypatch.setitem(export.WRITE, 'onnx', interrupt)
    status, _, err = cli('export', NAME, '--to', 'onnx', '--output', tmp_path / 'model.onnx')
    assert (status, err) == (130, 'timm-finet export: interrupted.\n')
    assert not list(tmp_path.iterdir())


def test_calibration_images_are_not_those_that_accuracy_is_measured_on():
    training, test = ({p.tobytes() for p in shipped_images(*args)[0]} for args in ((TRAINING_IMAGES,), ()))
    assert len(training) == 100 and len(test) == 400 and not training & test


@pytest.mark.parametrize('error', ['noise', 'offset', 'nan'])
def test_file_that_disagrees_is_not_written(error, tmp_path, monkeypatch, refused):
    change = dict(noise=lambda y: torch.randn_like(y), offset=lambda y: y + 0.1, nan=lambda y: y * float('nan'))[error]
    model = fuse_fbn(timm.create_model(NAME, pretrained=True).eval())
    monkeypatch.setitem(export.WRITE, 'onnx', lambda model, x, file, *args, **kwargs: open(file, 'w').close())
    monkeypatch.setitem(export.LOAD, 'onnx', lambda file: lambda x: change(model(x)))
    monkeypatch.setattr(export, 'shipped_images', few_images)
    old = tmp_path / 'model.onnx'
    old.write_text('kept')
    refused(['export', NAME, '--to', 'onnx', '--output', old], 'is not written, it disagrees: 100% equal top-1')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['kept']


@pytest.mark.parametrize('to, package', [('onnx', 'onnxruntime'), ('executorch', 'executorch')])
def test_missing_package_says_what_to_install(to, package, tmp_path, monkeypatch, refused):
    for name in [name for name in sys.modules if name.split('.')[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / 'model.bin'
    message = rf'needs the package \w+.*pip install {export.PACKAGES[to]}\.'
    refused(['export', NAME, '--to', to, '--output', output], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (['finet_smal', '--to', 'onnx'], "'finet_smal' is unknown: did you mean finet_small"),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}/no/model.onnx'], 'output=.*cannot be written'),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}'], 'output=.*cannot be written'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/no.pth'], 'checkpoint=.*no.pth.* does not exist'),
    (['finet_small', '--to', 'onnx', '--output', '/proc/model.onnx'], "output='/proc/model.onnx' cannot be written"),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}/model.pte'], 'output=.*model.pte.* does not go with --to onnx'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}'], 'checkpoint=.* is a folder'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/text.pth'], 'checkpoint=.*text.pth.* cannot be read'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/other.pth'],
     'checkpoint=.*other.pth.* does not fit finet_small'),
    (['finet_small', '--to', 'onnx', '--int8'], 'calibration: give images that finet_small was trained on'),
    (['finet_small', '--to', 'onnx', '--int8', '--calibration', '{tmp}/no.png'], 'no.png does not exist'),
    (['finet_small', '--to', 'onnx', '--calibration', '{tmp}'], 'needs --int8'),
    (['finet_small', '--to', 'onnx', '--img-size', '31'],
     '--img-size=31 is too small for finet_small, which reduces its input 32 times: give at least 32'),
    (['finet_small', '--to', 'executorch', '--dynamic-batch'], '--dynamic-batch does not go with --to executorch'),
])
def test_bad_input_gives_one_line(args, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.pth').write_text('no checkpoint')
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'other.pth')
    refused(['export'] + [arg.format(tmp=tmp_path) for arg in args], message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other.pth', 'text.pth']
