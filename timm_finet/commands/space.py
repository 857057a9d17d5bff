"""`timm-finet space`: serve a web page that classifies an image in train form at any G and fused, and times both."""
import os
import time
from functools import lru_cache
from statistics import median
from typing import List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_data_config

from ..fbn import FBNConv2d
from ..hub.pretrained import MODULES
from ..images import read_image, shipped_images
from ..rewrite import fuse_fbn
from .demo import PHOTOGRAPHS, SHIPPED, count

__all__ = ['app', 'space']

GROUPS = (1, 2, 4, 8)
ROUNDS = 20
COLUMN = 240  # px, the least width: three columns side by side on a laptop, one below the other on a phone
TEXT = '''
# Finet

This page shows the likeliest classes of an image. One trained network classifies it in two forms, which have the same
outputs. **Train form**: each FBN convolution makes G partial sums, batch-normalises each of them and adds the results,
as in the paper (arXiv 2005.06828). **Fused**: all of this is folded into one plain convolution. If you choose a G that
the network was not trained with, it keeps its trained weights and only splits them into another number of partial sums;
layers whose channels G does not divide keep their own G. A network knows only the classes that it was trained on, and
assigns every image to one of them.
'''


def regroup(layer: FBNConv2d, fbn_groups: int) -> FBNConv2d:
    """Split a layer into `fbn_groups` separately computed partial sums, with the same outputs in eval mode.

    A layer whose channels `fbn_groups` does not divide keeps its own groups.
    """
    if fbn_groups != layer.fbn_groups and layer.in_channels % fbn_groups == 0:
        conv = layer.fuse()
        layer = FBNConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            fbn_groups).eval()
        layer.weight = conv.weight
        with torch.no_grad():
            layer.bn.weight.copy_((layer.bn.running_var + layer.bn.eps).sqrt())
            layer.bn.bias.copy_((conv.bias / fbn_groups).repeat(fbn_groups))
    layer.forward = layer.reference  # in eval mode it would fold on the fly
    return layer


@lru_cache(maxsize=8)
def forms(name: str, fbn_groups: int) -> Tuple[nn.Module, nn.Module]:
    """A trained network in train form at G = `fbn_groups`, and in fused form."""
    model = timm.create_model(name, pretrained=True).eval()
    fused = fuse_fbn(model)
    for key, module in list(model.named_modules()):
        if isinstance(module, FBNConv2d):
            model.set_submodule(key, regroup(module, fbn_groups))
    return model, fused


def read_upload(path: str, name: Optional[str]) -> Image.Image:
    """Call `read_image`; its ValueError has the file's original name instead of the server's path."""
    try:
        return read_image(path)
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(str(path), name or 'This file')) from error


@torch.inference_mode()
def classify(image: Image.Image, name: str, fbn_groups: int) -> List[Union[dict, str]]:
    """The five likeliest classes and the milliseconds of each form: median of `ROUNDS`, timed in turns."""
    networks = forms(name, fbn_groups)
    cfg = networks[0].pretrained_cfg
    x = create_transform(**resolve_data_config(pretrained_cfg=cfg, use_test_size=True))(image.convert('RGB'))[None]
    seconds = ([], [])
    for _ in range(ROUNDS + 1):
        for network, times in zip(networks, seconds):
            start = time.perf_counter()
            network(x)
            times.append(time.perf_counter() - start)
    names = cfg.get('label_names') or [str(i) for i in range(cfg['num_classes'])]
    results = []
    for network, times in zip(networks, seconds):
        probabilities, classes = network(x).softmax(1)[0].topk(min(5, len(names)))
        top = {names[c]: p for p, c in zip(probabilities.tolist(), classes.tolist())}
        results += [top, f'{1000 * median(times[1:]):.2f} ms']  # the first was warm-up
    return results


def app():
    """Build the page as `gradio.Blocks`."""
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')  # gradio reads it on import
    try:
        import gradio as gr
    except ImportError as error:
        raise RuntimeError("gradio is missing: pip install gradio.") from error

    def answer(image, name, fbn_groups):
        if image is None:
            raise gr.Error('Give an image first.', print_exception=False)
        return classify(image, name, fbn_groups)

    def read(payload):
        if payload is None:
            return None
        try:  # gradio itself turns 16-bit images white, and prints a traceback for files that are no images
            return read_upload(payload.path, payload.orig_name)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    names = timm.list_models(module=MODULES, pretrained=True)
    with gr.Blocks(title='Finet', analytics_enabled=False) as page:
        gr.Markdown(TEXT)
        with gr.Row():
            with gr.Column(min_width=COLUMN):
                image = gr.Image(type='pil', label='Image', height=280, sources=['upload', 'clipboard'])
                image.preprocess = read
                name = gr.Dropdown(names, value=PHOTOGRAPHS, label='Network')
                fbn_groups = gr.Radio(GROUPS, value=4, label='G, partial sums in the train form')
                button = gr.Button('Classify', variant='primary')
            outputs = []
            for title in ('Train form', 'Fused'):
                with gr.Column(min_width=COLUMN):
                    outputs += [gr.Label(label=title), gr.Textbox(label=f'{title}: time for this image')]
        inputs = [image, name, fbn_groups]
        examples = gr.Examples([[tile] for tile in shipped_images()[0][::40]], image, label='Test images of CIFAR-10')
        examples.dataset.click(lambda: SHIPPED, None, name)  # the network for these images
        button.click(answer, inputs, outputs)
        threads = count(torch.get_num_threads(), 'CPU thread')
        gr.Markdown(f'Times are medians of {ROUNDS} runs on {threads}; the two forms were timed in turns.')
    return page


def space() -> None:
    """Serve the page locally until interrupted."""
    page = app()
    import gradio
    page.launch(theme=gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']))
