"""The page in hf_cards/space_browser in headless Chromium: its answers beside PyTorch's, and what it says of errors.

It needs the package playwright, a Chromium on the machine, and what hf_cards/space_browser/build.sh makes.
"""
import base64
import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'hf_cards' / 'space_browser'
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is missing: pip install playwright')
if not CHROMIUM:
    pytest.skip('Chromium is missing: put it into PATH', allow_module_level=True)
if not (FOLDER / 'models' / 'model.json').is_file():
    pytest.skip('The page is missing its network: run hf_cards/space_browser/build.sh', allow_module_level=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import create_transform  # noqa: E402

from timm_finet.commands import export  # noqa: E402
from timm_finet.images import read_image, shipped_images  # noqa: E402

CONFIG = json.loads((FOLDER / 'models' / 'model.json').read_text())
TRANSFORM = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
FLAGS = [
    '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--use-fake-device-for-media-stream']


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def url():
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=FOLDER))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, loaded, in a context of its own; it must have asked nobody but its own server."""
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(120_000)
        asked = []
        page.on('request', lambda request: asked.append(request.url))
        page.goto(url)
        said(page, 'Give an image')
        yield page
        assert asked and all(a.startswith((url, 'blob:', 'data:')) for a in asked), asked


def said(page, text):
    page.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)


def answers(page):
    """The classes that the page shows, with their probabilities, once it has any."""
    said(page, ' ms on one thread')
    return {name: float(percent[:-1]) / 100 for name, percent in
            (item.locator('span').all_inner_texts() for item in page.locator('#top li').all())}


def classify(page, file):
    page.evaluate("document.getElementById('status').textContent = ''")
    page.set_input_files('#file', file)
    return answers(page)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Image files with the fused network's probabilities in PyTorch: PNG files of 32 px, and a photograph as JPEG."""
    folder = tmp_path_factory.mktemp('images')
    files = []
    for i, tile in enumerate(shipped_images()[0][::20]):
        files.append(folder / f'{i}.png')
        tile.save(files[-1])
    try:
        import matplotlib
        files.append(Path(matplotlib.get_data_path()) / 'sample_data' / 'grace_hopper.jpg')
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(files[-1]) as photograph:  # as a phone on its side writes it
            photograph.transpose(Image.Transpose.ROTATE_90).save(folder / 'turned.jpg', quality=95, exif=exif)
        files.append(folder / 'turned.jpg')
    except ModuleNotFoundError:
        pass
    transform = create_transform(**{key: CONFIG[key] for key in TRANSFORM})
    x = torch.stack([transform(read_image(file)) for file in files])
    with torch.inference_mode():
        return list(zip(files, export.build(CONFIG['name'])(x).softmax(1)))


@pytest.mark.parametrize('precision', CONFIG['megabytes'])
def test_answers_are_pytorchs(precision, page, images):
    if len(CONFIG['megabytes']) > 1:
        page.get_by_label(precision).check()
    same = []
    for file, expected in images:
        got = classify(page, file)
        assert len(got) == min(5, len(expected)) and list(got.values()) == sorted(got.values(), reverse=True)
        same.append(next(iter(got)) == CONFIG['labels'][expected.argmax()])
        if precision == 'float32':
            tolerance = 1e-4 if file.suffix == '.png' else 0.05  # Chromium's JPEG decoder is not Pillow's
            for name, probability in got.items():
                assert probability == pytest.approx(expected[CONFIG['labels'].index(name)].item(), abs=tolerance), file
    assert sum(same) / len(same) >= export.LEAST_AGREEMENT[precision]


@pytest.mark.parametrize('width, height, size, crop_pct', [
    (301, 200, 128, 0.875), (37, 50, 32, 1.0), (20, 33, 32, 0.95), (32, 32, 32, 1.0)])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_transform_is_timms(interpolation, width, height, size, crop_pct, page):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    config = {**CONFIG, 'input_size': [3, size, size], 'crop_pct': crop_pct, 'interpolation': interpolation}
    got = page.evaluate('''async ([pixels, width, height, config]) => {
        const {transform} = await import('./transform.js');
        const data = Uint8ClampedArray.from(atob(pixels), c => c.charCodeAt());
        return Array.from(transform({data, width, height}, config).input);
    }''', [base64.b64encode(pixels).decode(), width, height, config])
    expected = create_transform(**{key: config[key] for key in TRANSFORM})(Image.fromarray(pixels[..., :3]))
    torch.testing.assert_close(torch.tensor(got).view_as(expected), expected, rtol=0, atol=1e-5)


def test_dropped_file_and_then_a_dropped_text(page, images):
    drop = '''bytes => {
        const dataTransfer = new DataTransfer();
        if (bytes) dataTransfer.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt())], 'image'));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));
    }'''
    file, expected = images[0]
    page.evaluate(drop, base64.b64encode(file.read_bytes()).decode())
    assert next(iter(answers(page))) == CONFIG['labels'][expected.argmax()]
    page.evaluate(drop, None)
    said(page, 'not an image file')
    assert not page.locator('#results').is_visible()


def test_camera(page):
    page.context.grant_permissions(['camera'])
    page.get_by_role('button', name='Use the camera').click()
    page.get_by_role('button', name='Take the image').click()
    assert len(answers(page)) == min(5, len(CONFIG['labels'])) and not page.locator('video').is_visible()
    assert page.evaluate("document.getElementById('video').srcObject.getTracks().every(t => t.readyState == 'ended')")


def test_refused_camera(page):
    page.get_by_role('button', name='Use the camera').click()
    said(page, 'The camera cannot be used')


def test_file_that_is_no_image(page, tmp_path, images):
    (tmp_path / 'text.png').write_text('no image')
    page.set_input_files('#file', tmp_path / 'text.png')
    said(page, 'not an image file that this browser can read')
    assert page.locator('#status.error').count() == 1
    classify(page, images[0][0])  # goes on
    assert page.locator('#status.error').count() == 0


def test_network_that_does_not_load(page, images):
    page.route('**/*.onnx', lambda route: route.abort())
    page.set_input_files('#file', images[0][0])
    said(page, 'The float32 network did not load')
    page.unroute('**/*.onnx')
    assert classify(page, images[0][0])  # tries again
    page.route('**/model.json', lambda route: route.fulfill(status=404))
    page.reload()
    said(page, 'The network did not load')
    page.set_input_files('#file', images[0][0])
    said(page, 'The network did not load')


def test_keyboard_reaches_all_and_all_is_named(page):
    reached, controls = [], ['a', 'file', 'camera', *(['input'] if len(CONFIG['megabytes']) > 1 else [])]
    for _ in controls:
        page.keyboard.press('Tab')
        reached.append(page.evaluate('document.activeElement.id || document.activeElement.tagName.toLowerCase()'))
    assert reached == controls
    assert page.get_by_label(re.compile('Drop an image here')).count() == 1
    assert page.get_by_role('group', name='Precision').count() == ('input' in controls)  # with two to choose from
    assert page.get_by_role('region', name='Result').get_attribute('aria-live') == 'polite'


@pytest.mark.parametrize('width', [320, 390])
def test_no_horizontal_scroll_on_a_phone(width, page, images):
    page.set_viewport_size({'width': width, 'height': 844})
    classify(page, images[-1][0])
    assert page.evaluate('document.documentElement.scrollWidth') <= width
