"""`timm-finet export` as a user calls it. Tests of a runtime are skipped where it is not installed."""
import re
import sys
from importlib.util import find_spec

import pytest
import timm
import torch

from timm_finet import export, fuse_fbn
from timm_finet.cli import main
from timm_finet.data import TRAINING_PICTURES, shipped_pictures

NAME = 'finet_small_g4.cifar10'
RUNTIMES = [
    pytest.param('onnx', marks=pytest.mark.skipif(not find_spec('onnxruntime'), reason='needs timm-finet[export]')),
    pytest.param('executorch', marks=pytest.mark.skipif(not find_spec('executorch'), reason='needs timm-finet[executorch]')),
]


@pytest.fixture
def refused(capsys):
    def check(args, message):
        with pytest.raises(SystemExit) as exit:
            main(['export', *map(str, args)])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count('\n') == 1 and re.search(message, error), error
    return check


@pytest.mark.parametrize('to', RUNTIMES)
def test_file_gives_pytorchs_answers(to, tmp_path, capsys):
    file = tmp_path / f'model{export.SUFFIXES[to]}'
    main(['export', NAME, '--to', to, '--output', str(file)])
    out = capsys.readouterr().out
    assert 'top-1 as in PyTorch: 100.00% of 400 pictures' in out and 'input 1x3x32x32' in out
    assert [p.name for p in tmp_path.iterdir()] == [file.name] and 5 < file.stat().st_size / 2 ** 20 < 6
    x = torch.randn(1, 3, 32, 32)
    expected = timm.create_model(NAME, pretrained=True).eval()(x)
    torch.testing.assert_close(export.LOAD[to](str(file))(x), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('to', RUNTIMES)
def test_int8_file_is_small_and_stays_right(to, tmp_path, capsys):
    file = tmp_path / f'model{export.SUFFIXES[to]}'
    main(['export', NAME, '--to', to, '--int8', '--output', str(file)])
    before, after = re.search(r'right: ([\d.]+)% in PyTorch, ([\d.]+)% in the file', capsys.readouterr().out).groups()
    assert float(after) > float(before) - 3 and file.stat().st_size / 2 ** 20 < 2


@pytest.mark.parametrize('form', ['train', 'fused'])
@pytest.mark.parametrize('name', ['finet_small_se_g2', 'resnet18_fbn'])
def test_checkpoint_in_either_form(name, form, tmp_path, randomise):
    model = randomise(timm.create_model(name, num_classes=5)).eval()
    saved = fuse_fbn(model) if form == 'fused' else model
    torch.save({'state_dict': saved.state_dict()}, tmp_path / 'checkpoint.pth')
    built = export.build(name, str(tmp_path / 'checkpoint.pth'))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built(x), fuse_fbn(model)(x))


def test_other_networks_of_timm_are_built_fused(tmp_path, randomise):
    model = randomise(timm.create_model('mobilenetv3_small_050', num_classes=3)).eval()
    torch.save(model.state_dict(), tmp_path / 'checkpoint.pth')
    built = export.build('mobilenetv3_small_050', str(tmp_path / 'checkpoint.pth'))
    assert not any('running_var' in key for key in built.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built(x), model(x), rtol=1e-4, atol=1e-4)


def test_calibration_pictures_are_not_those_that_accuracy_is_measured_on():
    training, test = ({p.tobytes() for p in shipped_pictures(*args)[0]} for args in ((TRAINING_PICTURES,), ()))
    assert len(training) == 100 and len(test) == 400 and not training & test


@pytest.mark.parametrize('error', ['noise', 'offset', 'nan'])
def test_file_that_disagrees_is_not_written(error, tmp_path, monkeypatch, refused):
    change = dict(noise=lambda y: torch.randn_like(y), offset=lambda y: y + 0.1, nan=lambda y: y * float('nan'))[error]
    model = fuse_fbn(timm.create_model(NAME, pretrained=True).eval())
    monkeypatch.setitem(export.WRITE, 'onnx', lambda model, x, file, calibration: open(file, 'w').close())
    monkeypatch.setitem(export.LOAD, 'onnx', lambda file: lambda x: change(model(x)))
    monkeypatch.setattr(export, 'shipped_pictures', lambda: [part[:20] for part in shipped_pictures()])
    old = tmp_path / 'model.onnx'
    old.write_text('kept')
    refused([NAME, '--to', 'onnx', '--output', old], 'is not written, it disagrees: 100% equal top-1')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['kept']


@pytest.mark.parametrize('to, package', [('onnx', 'onnxruntime'), ('executorch', 'executorch')])
def test_missing_package_names_the_extra(to, package, tmp_path, monkeypatch, refused):
    for name in [name for name in sys.modules if name.split('.')[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / 'model.bin'
    refused([NAME, '--to', to, '--output', output], rf"needs the package \w+.*pip install 'timm-finet\[{export.EXTRAS[to]}\]'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (['finet_smal', '--to', 'onnx'], "'finet_smal' is unknown: did you mean finet_small"),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}/no/model.onnx'], 'output=.*cannot be written'),
    (['finet_small', '--to', 'onnx', '--output', '{tmp}'], 'output=.*cannot be written'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/no.pth'], 'checkpoint=.*no.pth.* does not exist'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/text.pth'], 'checkpoint=.*text.pth.* does not fit finet_small'),
    (['finet_small', '--to', 'onnx', '--checkpoint', '{tmp}/other.pth'], 'checkpoint=.*other.pth.* does not fit finet_small'),
    (['finet_small', '--to', 'onnx', '--int8'], 'calibration: give pictures that finet_small was trained on'),
    (['finet_small', '--to', 'onnx', '--int8', '--calibration', '{tmp}/no.png'], 'no.png does not exist'),
    (['finet_small', '--to', 'onnx', '--calibration', '{tmp}'], 'needs --int8'),
])
def test_bad_input_gives_one_line(args, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.pth').write_text('no checkpoint')
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'other.pth')
    refused([arg.format(tmp=tmp_path) for arg in args], message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other.pth', 'text.pth']
