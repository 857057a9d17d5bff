"""One preprocessing wherever a network goes: the same images give the same input, as large as weights are tested at."""
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_finet import fuse_fbn
from timm_finet.commands import demo, export, space
from timm_finet.hub import save_for_hf
from timm_finet.images import shipped_images

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'hf_cards' / 'space_browser'
NAME = 'finet_small_se_g4.tiny_in200'
SIZES = (300, 200), (200, 311), (640, 480), (97, 33), (160, 160), (150, 900)

needs_onnx = pytest.mark.skipif(not find_spec('onnxruntime'), reason='onnxruntime is missing: install the extra export')


@pytest.fixture(scope='module')
def photographs():
    """Shipped images, enlarged, with noise: what is fine shows how an image is resized."""
    random = np.random.default_rng(0)
    tiles = [tile.resize(size) for tile, size in zip(shipped_images()[0][::70], SIZES)]
    return [Image.fromarray((np.asarray(tile) * 0.8 + random.integers(0, 50, (*tile.size[::-1], 1))).astype(np.uint8))
            for tile in tiles]


@pytest.fixture(scope='module')
def model():
    return fuse_fbn(timm.create_model(NAME, pretrained=True).eval())


@pytest.fixture(scope='module')
def expected(photographs):
    """The input by timm's own transform, at the size for testing."""
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(NAME).to_dict(), use_test_size=True)
    assert config['input_size'] == (3, 160, 160)
    return prepare(photographs, config)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp('export') / 'float32.onnx'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'shipped_images', lambda: [part[:20] for part in shipped_images()])
        export.export(NAME, 'onnx', str(file))
    return file


def prepare(images, config):
    transform = create_transform(**config)
    return torch.stack([transform(image) for image in images])


def by_demo(images, tmp_path, monkeypatch, request):
    seen, classify = [], demo.classify
    monkeypatch.setattr(demo, 'PHOTOGRAPHS', NAME)
    monkeypatch.setattr(demo, 'classify', lambda networks, x: seen.append(x) or classify(networks, x))
    for i, image in enumerate(images):
        image.save(tmp_path / f'{i}.png')
    demo.demo([str(tmp_path)], str(tmp_path / 'sheet.png'))
    return seen[0]


def by_space(images, tmp_path, monkeypatch, request):
    seen = []
    monkeypatch.setattr(space, 'ROUNDS', 1)
    handle = space.forms(NAME, 4)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for image in images:
        space.classify(image, NAME, 4)
    handle.remove()
    return torch.cat(seen[::len(seen) // len(images)])


def by_export(images, tmp_path, monkeypatch, request):
    seen = []
    monkeypatch.setattr(export, 'shipped_images', lambda: (images, [0] * len(images)))
    monkeypatch.setitem(export.WRITE, 'onnx', lambda model, x, file, *args, **kwargs: (
        seen.append(model), Path(file).touch()))
    monkeypatch.setitem(export.LOAD, 'onnx', lambda file: lambda x: seen.append(x) or seen[0](x))
    export.export(NAME, 'onnx', str(tmp_path / 'model.onnx'))
    return torch.cat(seen[1:])


def page_config(tmp_path, request):
    """What build.sh writes for the page."""
    shutil.copy(request.getfixturevalue('file'), tmp_path)
    script = re.search(r"<<'END'\n(.*?)^END$", (PAGE / 'build.sh').read_text(), re.S | re.M)[1]
    subprocess.run([sys.executable, '-c', script, str(tmp_path)], check=True)
    return json.loads((tmp_path / 'model.json').read_text())


def by_page_config(images, tmp_path, monkeypatch, request):
    config = page_config(tmp_path, request)
    assert config['name'] == NAME and config['labels'][0] == 'goldfish' and len(config['labels']) == 200
    assert config['megabytes'] == {'float32': pytest.approx(8.3, abs=0.5)}
    return prepare(images, {key: config[key] for key in (
        'input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')})


def by_page(images, tmp_path, monkeypatch, request):
    if not shutil.which('node'):
        pytest.skip('Node.js is missing: install it, and put node into PATH')
    page_config(tmp_path, request)
    shutil.copy(PAGE / 'transform.js', tmp_path / 'transform.mjs')
    (tmp_path / 'run.mjs').write_text('''
        import {readFileSync, writeFileSync} from 'node:fs';
        import {transform} from './transform.mjs';
        globalThis.ImageData = class {
            constructor(width, height) { this.data = new Uint8ClampedArray(4 * width * height); }
        };
        const [config, ...files] = process.argv.slice(2);
        for (const file of files) {
            const [width, height] = file.match(/\\d+x\\d+/)[0].split('x').map(Number);
            const image = {data: readFileSync(file), width, height};
            writeFileSync(`${file}.out`, transform(image, JSON.parse(readFileSync(config))).input);
        }''')
    files = [tmp_path / f'{image.width}x{image.height}' for image in images]
    for image, file in zip(images, files):
        file.write_bytes(image.convert('RGBA').tobytes())
    subprocess.run(['node', 'run.mjs', 'model.json', *(file.name for file in files)], cwd=tmp_path, check=True)
    return torch.stack([
        torch.from_numpy(np.fromfile(f'{file}.out', np.float32).reshape(3, 160, 160)) for file in files])


def by_transformers(images, tmp_path, monkeypatch, request):
    transformers = pytest.importorskip('transformers', reason='transformers is missing: install the extra test')
    folder = str(tmp_path / 'saved')
    save_for_hf(timm.create_model(NAME, pretrained=True), folder, safe_serialization=True)
    return transformers.AutoImageProcessor.from_pretrained(folder)(images)['pixel_values']


def by_timm_from_the_hub(images, tmp_path, monkeypatch, request):
    save_for_hf(timm.create_model(NAME, pretrained=True), str(tmp_path), safe_serialization=True)
    return prepare(images, resolve_data_config(model=timm.create_model(f'local-dir:{tmp_path}', pretrained=True)))


@torch.inference_mode()
@pytest.mark.parametrize('way', [
    by_demo, by_space, by_export, pytest.param(by_page_config, marks=needs_onnx),
    pytest.param(by_page, marks=needs_onnx), by_transformers, by_timm_from_the_hub])
def test_an_image_is_prepared_alike_everywhere(way, photographs, expected, model, tmp_path, monkeypatch, request):
    x = way(photographs, tmp_path, monkeypatch, request)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), model(expected), rtol=0, atol=1e-3)
    assert torch.equal(model(x).argmax(1), model(expected).argmax(1))


def test_the_size_for_training_is_resolved_for_checkpoints_alone():
    found = set()
    for folder in ('timm_finet', 'scripts', 'hf_cards', 'docs', '.'):
        pattern = '*' if folder == '.' else '**/*'
        for path in (ROOT / folder).glob(pattern):
            if path.suffix in ('.py', '.md', '.sh'):
                calls = re.findall(r'resolve_\w*data_config\(.*', path.read_text())
                found |= {str(path.relative_to(ROOT)) for call in calls if 'use_test_size=True' not in call}
    assert found == {'timm_finet/hub/checkpoint.py'}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The reader in docs/export.md, as it stands, as a function of an ONNX file and an image."""
    code = re.search(r'```python\n(.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)

    def run(file, image):
        shutil.copy(file, 'model.onnx')
        image.save('image.jpg', format='PNG')  # without loss
        scope = {}
        exec(code, scope)
        return scope['logits']
    return run


@needs_onnx
def test_reader_of_the_documentation_gives_pytorchs_answers(read, file, photographs, expected, model, capsys):
    capsys.readouterr()
    with torch.inference_mode():
        logits = model(expected)
    for image, right in zip(photographs, logits):
        torch.testing.assert_close(torch.from_numpy(read(file, image)), right, rtol=1e-4, atol=1e-4)
    names = timm.get_pretrained_cfg(NAME).label_names
    assert capsys.readouterr().out.splitlines() == [names[i] for i in logits.argmax(1)]


@needs_onnx
@pytest.mark.parametrize('size, crop_pct, interpolation', [
    (75, 0.875, 'bilinear'), (64, 0.9, 'bicubic'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((32, 1.0, 'lanczos'), (33, 0.95, 'bilinear')))])
def test_reader_of_the_documentation_prepares_an_image_as_timm(
        size, crop_pct, interpolation, read, photographs, tmp_path):
    pixels = nn.Flatten()  # a network whose logits are its input
    pixels.num_classes, pixels.pretrained_cfg = 3 * size ** 2, {}
    config = resolve_data_config(dict(
        img_size=size, crop_pct=crop_pct, interpolation=interpolation, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    x, file = prepare(photographs, config), tmp_path / 'pixels.onnx'
    export.to_onnx(pixels, x[:1], str(file), metadata=export.make_metadata('pixels', pixels, config))
    for image, right in zip(photographs, x):
        torch.testing.assert_close(torch.from_numpy(read(file, image)), right.flatten(), rtol=0, atol=1e-5)
