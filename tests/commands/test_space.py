"""`timm-finet space`: the page's two forms, and the page."""
import sys

import pytest
import torch
from PIL import Image

from timm_finet import FBNConv2d
from timm_finet.commands import space

NAME = 'finet_small_g4.cifar10'
WITHOUT_GRADIO = 'gradio is missing: install the extra space'


@pytest.mark.parametrize('fbn_groups', space.GROUPS)
def test_forms_are_one_function_at_any_groups(fbn_groups):
    train, fused = space.forms(NAME, fbn_groups)
    layers = [m for m in train.modules() if isinstance(m, FBNConv2d)]
    assert all(layer.fbn_groups == (fbn_groups if layer.in_channels % fbn_groups == 0 else 4) for layer in layers)
    assert not any(isinstance(m, FBNConv2d) for m in fused.modules())
    widths = []
    layers[-1].bn.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(train(x), fused(x), rtol=1e-4, atol=1e-4)
    assert widths == [fbn_groups * layers[-1].out_channels]  # the partial sums were there


def test_a_image_gets_five_classes_and_a_time_by_each_form():
    image = space.shipped_images()[0][0]
    train, train_time, fused, fused_time = space.classify(image.convert('RGBA').resize((300, 200)), NAME, 4)
    assert list(train) == list(fused) and len(train) == 5 and next(iter(train)) == 'airplane'
    assert train_time.endswith(' ms') and float(fused_time.split()[0]) > 0


def test_page_is_built_and_sends_nothing_out():
    pytest.importorskip('gradio', reason=WITHOUT_GRADIO)
    page = space.app()
    assert not page.analytics_enabled
    config = str(page.get_config_file())
    assert NAME in config and all(title in config for title in ('Train form', 'Fused'))


def test_without_gradio_one_line_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    refused(['space'], '^timm-finet space: gradio is missing: pip install gradio.$')


@pytest.mark.parametrize('name', ['text.txt', 'text.png', 'drawing.svg'])
def test_a_file_that_is_no_image_gets_one_line(name, tmp_path):
    gradio = pytest.importorskip('gradio', reason=WITHOUT_GRADIO)
    from gradio.data_classes import ImageData
    (tmp_path / name).write_text('no image')
    upload = next(block for block in space.app().blocks.values() if isinstance(block, gradio.Image))
    with pytest.raises(gradio.Error, match=f'^.?{name} is not an image') as error:
        upload.preprocess(ImageData(path=str(tmp_path / name), orig_name=name))
    assert not error.value.print_exception


def test_an_upload_is_read_as_all_images_and_named_as_its_owner_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('I;16', (6, 4), 257 * 100).save(tmp_path / 'stored.png', exif=exif)
    image = space.read_upload(str(tmp_path / 'stored.png'), 'mine.png')
    assert image.size == (4, 6) and image.getpixel((0, 0)) == (100, 100, 100)
    (tmp_path / 'stored.png').write_text('no image')
    with pytest.raises(ValueError, match='^mine.png is not an image that Pillow can read.$'):
        space.read_upload(str(tmp_path / 'stored.png'), 'mine.png')
    with pytest.raises(ValueError, match='^This file does not exist'):
        space.read_upload(str(tmp_path / 'none.png'), None)
