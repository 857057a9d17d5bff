"""`timm-finet export` as a user calls it. Tests of a runtime are skipped where it is not installed."""
import argparse
import json
import re
import sys
import types
from ast import literal_eval
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

from timm_finet import fuse_fbn
from timm_finet.commands import export, runtimes
from timm_finet.data.datasets import CIFAR10
from timm_finet.images import TRAINING_IMAGES, shipped_images
from timm_finet_cli import main

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
    if to == 'onnx':  # each output channel has a scale of its own
        import onnx
        graph = onnx.load(file).graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        scales = [(shapes[node.input[0]], shapes[node.input[1]]) for node in graph.node
                  if node.op_type == 'DequantizeLinear' and len(shapes.get(node.input[0], ())) == 4]
        assert scales and all(scale == weight[:1] for weight, scale in scales)
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 4]
        assert max(abs(weight.astype(int)).max() for weight in weights) <= 64  # 8 bits overflow on some processors


@pytest.mark.slow
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
        'calibration is missing: give training images of finet_small_g4')
    for i, tile in enumerate(shipped_images()[0][::10]):
        (tmp_path / 'train' / str(i % 3)).mkdir(parents=True, exist_ok=True)
        tile.save(tmp_path / 'train' / str(i % 3) / f'{i}.png')
    seen = exported('--checkpoint', file, '--int8', '--calibration', tmp_path / 'train')
    out = capsys.readouterr().out
    assert 'right: ' not in out and 'of 40 calibration images' in out and len(seen['calibration']) == 40


def test_calibration_takes_some_of_a_whole_training_set(trained, exported, tmp_path, monkeypatch):
    file, _ = trained(dataset='')
    for level, name in enumerate('abcde'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('L', (48, 48), 50 * level).save(tmp_path / 'train' / name / '0.png')
    monkeypatch.setattr(export, 'CALIBRATION', 3)
    taken = exported('--checkpoint', file, '--int8', '--calibration', tmp_path / 'train')['calibration']
    levels = ((taken * 0.4 + 0.1) * 255).round()[:, 0, 0, 0]  # the first channel, normalised
    assert levels.tolist() == [0, 100, 200]  # not the first three: these may be of one class


@pytest.fixture
def fewer(monkeypatch):
    """A tenth of the shipped images: of each class as many."""
    monkeypatch.setattr(export, 'shipped_images', lambda *args: [part[::10] for part in shipped_images(*args)])


def test_int8_of_cifar10_is_calibrated_on_shipped_images_of_the_training_set(trained, exported, fewer):
    file, _ = trained(dataset='torch/cifar10_pad2')
    seen = exported('--checkpoint', file, '--int8')
    transform = timm.data.create_transform((3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    expected = torch.stack([transform(image) for image in shipped_images(TRAINING_IMAGES)[0][::10]])
    torch.testing.assert_close(seen['calibration'], expected)


@pytest.mark.parametrize('dynamic', [False, True])
def test_a_file_is_tried_with_as_many_images_at_a_time_as_it_is_for(dynamic, trained, exported, fewer, monkeypatch):
    file, _ = trained(dataset='torch/cifar10_pad2')
    sizes, load = set(), export.LOAD['onnx']
    monkeypatch.setitem(export.LOAD, 'onnx', lambda file: lambda x: sizes.add(len(x)) or load(file)(x))
    exported('--checkpoint', file, *['--dynamic-batch'] * dynamic)
    assert max(sizes) > 1 if dynamic else sizes == {1}


@pytest.mark.parametrize('wrong, factor, int8, refused', [
    (0, 1.0009, False, ''), (0, 1.0011, False, r'equal top-1 and a difference of 0\.001 of the largest logit'),
    (1, 1, False, '100% equal top-1'), (2, 1.5, True, ''), (3, 1, True, '95% equal top-1 are required')])
def test_a_file_may_disagree_by_rounding_alone(
        wrong, factor, int8, refused, trained, exported, fewer, monkeypatch, capsys):
    """In int8 on one image in twenty, here two of forty; else on none, and in the logits by a thousandth."""
    file, _ = trained(dataset='torch/cifar10_pad2')
    saved = torch.load(file, weights_only=False)
    saved['state_dict_ema']['classifier.weight'].zero_()
    logits = saved['state_dict_ema']['classifier.bias'] = torch.tensor([1, 1 - 1e-4, *[0.] * 8])
    torch.save(saved, file)
    given = iter([logits[[1, 0, *range(2, 10)]]] * wrong + [logits] * (40 - wrong))
    monkeypatch.setitem(export.LOAD, 'onnx', lambda file: lambda x: factor * next(given)[None])
    with pytest.raises(SystemExit) if refused else nullcontext():
        exported('--checkpoint', file, *['--int8'] * int8)
    out, err = capsys.readouterr()
    assert re.search(f'is not written because it disagrees with PyTorch: .*{refused}' if refused else '^$', err)
    assert f'right: 10.00% in PyTorch, {10 - 2.5 * wrong:.2f}% in the file' in out  # first come airplanes


@pytest.mark.parametrize('by', ['name', 'checkpoint'])
def test_random_weights_are_said_to_be_random(by, trained, exported, monkeypatch, capsys):
    monkeypatch.setattr(export, 'shipped_images', lambda: [part[:1] for part in shipped_images()])
    exported(*(['--checkpoint', trained(dataset='')[0]] if by == 'checkpoint' else ['--img-size', 32]))
    assert ('the weights are random' in capsys.readouterr().out) == (by == 'name')


class Recorded(nn.Module):
    def __init__(self, model, quantizer):
        super().__init__()
        self.model, self.quantizer, self.seen = model, quantizer, []

    def forward(self, x):
        self.seen.append(x)
        return self.model(x)


class Converted(nn.Module):
    def __init__(self, prepared):
        super().__init__()
        self.prepared = [prepared]

    def forward(self, x):
        return self.prepared[0].model(x).mul(2)


@pytest.mark.parametrize('int8', [False, True])
def test_executorch_is_asked_for_xnnpack_and_int8_per_channel_on_every_calibration_image(int8, monkeypatch, tmp_path):
    """Stand-ins for both packages: what they are asked for, and not what they make of it."""
    seen = {}

    def lower(program, partitioner):
        seen.update(program=program, partitioner=partitioner)
        return types.SimpleNamespace(to_executorch=lambda: types.SimpleNamespace(buffer=b'program'))

    def convert(prepared):
        seen.update(prepared=prepared)
        return Converted(prepared)
    quantizer = types.SimpleNamespace(set_global=lambda config: config)
    members = {
        'executorch.backends.xnnpack.partition.xnnpack_partitioner': dict(XnnpackPartitioner=lambda: 'xnnpack'),
        'executorch.exir': dict(to_edge_transform_and_lower=lower),
        'executorch.backends.xnnpack.quantizer.xnnpack_quantizer': dict(
            XNNPACKQuantizer=lambda: quantizer, get_symmetric_quantization_config=lambda **config: config),
        'torchao.quantization.pt2e.quantize_pt2e': dict(prepare_pt2e=Recorded, convert_pt2e=convert)}
    for name, attributes in members.items():
        for i in range(1, name.count('.') + 2):
            monkeypatch.setitem(sys.modules, '.'.join(name.split('.')[:i]), types.ModuleType(name))
        for attribute, value in attributes.items():
            setattr(sys.modules[name], attribute, value)
    model, x = nn.Conv2d(3, 2, 1).eval(), torch.randn(1, 3, 4, 4)
    calibration = torch.randn(5, 3, 4, 4) if int8 else None
    export.WRITE['executorch'](model, x, str(tmp_path / 'model.pte'), calibration)
    assert (tmp_path / 'model.pte').read_bytes() == b'program' and seen['partitioner'] == ['xnnpack']
    torch.testing.assert_close(seen['program'].module()(x), model(x) * (2 if int8 else 1))
    if int8:
        assert seen['prepared'].quantizer == dict(is_per_channel=True)
        assert [len(image) for image in seen['prepared'].seen] == [1] * 5
        assert torch.equal(torch.cat(seen['prepared'].seen), calibration)


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
    refused(['export', NAME, '--to', 'onnx', '--output', old],
            'is not written because it disagrees with PyTorch: 100% equal top-1')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['kept']


@pytest.mark.parametrize('to, package', [('onnx', 'onnxruntime'), ('executorch', 'executorch')])
def test_missing_package_says_what_to_install(to, package, tmp_path, monkeypatch, refused):
    for name in [name for name in sys.modules if name.split('.')[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / 'model.bin'
    message = rf'needs the package \w+.*pip install {runtimes.PACKAGES[to]}\.'
    refused(['export', NAME, '--to', to, '--output', output], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (['finet_smal', '--to', 'onnx'], "'finet_smal' is unknown: did you mean finet_small"),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}/no/model.onnx'], 'output=.*cannot be written'),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}'], 'output=.*cannot be written'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/no.pth'], 'checkpoint=.*no.pth.* does not exist'),
    (['finet_small', '--to', 'onnx', '--output', '/proc/model.onnx'], "output='/proc/model.onnx' cannot be written"),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}/model.pte'], 'output=.*model.pte.* does not fit --to onnx'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}'], 'checkpoint=.* is a folder'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/text.pth'], 'checkpoint=.*text.pth.* cannot be read'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/other.pth'],
     'checkpoint=.*other.pth.* does not fit finet_small'),
    (['finet_small', '--to', 'onnx', '--int8'], 'calibration is missing: give training images of finet_small'),
    (['finet_small', '--to', 'onnx', '--int8', '--calibration', '{tmp}/no.png'], 'no.png does not exist'),
    (['finet_small', '--to', 'onnx', '--calibration', '{tmp}'], 'needs --int8'),
    (['finet_small', '--to', 'onnx', '--img-size', '31'],
     '--img-size=31 is too small for finet_small, which reduces its input by a factor of 32: give at least 32'),
    (['finet_small', '--to', 'executorch', '--dynamic-batch'], '--dynamic-batch does not work with --to executorch'),
])
def test_bad_input_gives_one_line(args, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.pth').write_text('no checkpoint')
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'other.pth')
    refused(['export'] + [arg.format(tmp=tmp_path) for arg in args], message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other.pth', 'text.pth']
