"""Draw a block of Finet as it is trained and as it is deployed, from traced graphs of both forms.

Boxes in one column run one after the other; the right column is Squeeze-and-Excitation, which reads the block's input.
"""
import matplotlib.pyplot as plt
import timm
import torch.nn as nn
from torch.fx import Tracer

from scripts.report import RESULTS
from timm_finet import FBNConv2d, fuse_fbn

FILES = {'finet_large_g4': 'block.png', 'finet_large_se_g4': 'block_se.png'}
COLORS = {'conv': '#cfe3f5', 'norm': '#fbd9b5', 'act': '#d7ead0', 'math': '#e8e8e8'}
HEIGHT, GAP, WIDTH = 0.62, 0.38, 3.3


class LayerTracer(Tracer):
    """A tracer that does not trace into convolutions, including this package's."""

    def is_leaf_module(self, module, name):
        return isinstance(module, (nn.Conv2d, FBNConv2d)) or super().is_leaf_module(module, name)


def describe(node, block):
    """A box's text and kind, or None for a module that does nothing."""
    if node.op != 'call_module':
        name = node.target if isinstance(node.target, str) else node.target.__name__
        return {'placeholder': "the block's input", 'output': "the block's output"}.get(
            node.op, {'mean': 'average pooling', 'mul': '×', 'add': '+'}.get(name, name)), 'math'
    module = block.get_submodule(node.target)
    if isinstance(module, nn.Identity):
        return None
    if isinstance(module, FBNConv2d):
        c, g, out = module.in_channels, module.fbn_groups, module.out_channels
        return f'{g} × (1x1 conv {c // g} to {out}, BN)\nsummed: FBN, G = {g}', 'norm'
    if isinstance(module, nn.Conv2d):
        kind = 'depthwise' if module.groups > 1 else 'conv'
        bias = '' if module.bias is None else ', bias'
        size = f'{module.kernel_size[0]}x{module.kernel_size[1]}'
        return f'{size} {kind} {module.in_channels} to {module.out_channels}{bias}', 'conv'
    if isinstance(module, nn.BatchNorm2d):
        return f'BN {module.num_features}', 'norm'
    return type(module).__name__, 'act'


def draw_block(ax, block, title):
    boxes, behind_conv1, bottoms = {}, set(), [0.0, 0.0]
    sources = {}  # for each node, the node whose box it uses: its own, or that of its input
    for node in LayerTracer().trace(block).nodes:
        inputs = [sources[i] for i in node.all_input_nodes]
        if node.target == 'conv1' or any(i in behind_conv1 for i in inputs):
            behind_conv1.add(node)
        text = describe(node, block)
        if text is None:
            sources[node] = inputs[0]
            continue
        sources[node] = node
        lane = int(bool(inputs) and node not in behind_conv1)
        above = [boxes[i][1] for i in inputs] + [bottoms[lane]]
        top = min(above) - GAP
        bottoms[lane] = top - HEIGHT
        x = lane * (WIDTH + 0.9)
        boxes[node] = x, bottoms[lane]
        ax.add_patch(plt.Rectangle(
            (x, bottoms[lane]), WIDTH, HEIGHT, facecolor=COLORS[text[1]], edgecolor='#444444', lw=0.8))
        ax.text(x + WIDTH / 2, bottoms[lane] + HEIGHT / 2, text[0], ha='center', va='center', fontsize=8, color='black')
        for source in inputs:
            connect(ax, boxes[source], boxes[node], skip=len(inputs) > 1 and source.op == 'placeholder')
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(-0.7, max(x for x, _ in boxes.values()) + WIDTH + 0.1))
    ax.axis('off')
    return min(bottoms)


def connect(ax, source, target, skip):
    """An arrow from box to box, along straight lines."""
    (x0, y0), (x1, y1) = source, target
    middle0, middle1 = y0 + HEIGHT / 2, y1 + HEIGHT / 2
    if skip:  # the identity, round the left side
        points = (x0, middle0), (x0 - 0.5, middle0), (x0 - 0.5, middle1), (x1, middle1)
    elif x0 == x1:
        points = (x0 + WIDTH / 2, y0), (x1 + WIDTH / 2, y1 + HEIGHT)
    elif x0 < x1:  # to the right: along the source's height, then down
        points = (x0 + WIDTH, middle0), (x1 + WIDTH / 2, middle0), (x1 + WIDTH / 2, y1 + HEIGHT)
    else:  # back to the left: down, then along the target's height
        points = (x0 + WIDTH / 2, y0), (x0 + WIDTH / 2, middle1), (x1 + WIDTH, middle1)
    if len(points) > 2:
        ax.plot(*zip(*points[:-1]), color='#444444', lw=1)
    ax.annotate('', points[-1], points[-2], arrowprops=dict(arrowstyle='->', color='#444444', lw=1))


def draw_forms(name, file):
    model = timm.create_model(name).eval()
    block, fused = (network.stages[0][1] for network in (model, fuse_fbn(model)))
    fig, axes = plt.subplots(1, 2, figsize=(5.5 if block.se is None else 9.5, 6.4), layout='constrained')
    bottoms = [
        draw_block(ax, form, f'{title}, {sum(p.numel() for p in form.parameters()):,} parameters')
        for ax, form, title in zip(axes, (block, fused), ('train form', 'fused'))]
    for ax in axes:
        ax.set_ylim(min(bottoms) - 0.2, 0)
    fig.suptitle(f'{name}: a block of stride 1, {block.conv1.in_channels} channels', fontsize=11)
    fig.savefig(file, dpi=130, facecolor='white')


def draw():
    for name, file in FILES.items():
        draw_forms(name, RESULTS / file)
