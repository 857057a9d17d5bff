"""Reproduce Table 2: multiply-adds and parameters of Finet and other networks, beside the paper's figures.

    python -m scripts.paper.table2

This counts what `timm-finet flops` counts, fused, at 224 px unless stated, and writes results/table2.csv. The
accuracies are the paper's own; none of them is measured here.
"""
import fvcore
import matplotlib.pyplot as plt
import torch
import torchvision
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.report import RESULTS, command_line, facts, markdown, write_rows
from timm_finet import count_flops
from timm_finet.commands.flops import count_row, create

# The paper's Table 2: millions of multiply-adds, millions of parameters, top-1 on ImageNet.
PAPER = {
    'finet_small': (42.6, 2.388, 61.710),
    'finet_small_g2': (42.6, 2.392, 62.988),
    'finet_small_g4': (42.6, 2.402, 63.338),
    'finet_small_se': (43.0, 2.809, 64.632),
    'finet_small_se_g2': (43.0, 2.813, 65.322),
    'finet_small_se_g4': (43.0, 2.827, 65.706),
    'finet_large': (301.8, 4.434, 71.256),
    'finet_large_g2': (301.8, 4.448, 72.410),
    'finet_large_g4': (301.8, 4.477, 72.746),
    'finet_large_se': (303.2, 5.812, 72.790),
    'finet_large_se_g2': (303.2, 5.827, 73.642),
    'finet_large_se_g4': (303.2, 5.855, 73.786),
    'torchvision:shufflenet_v2_x0_5': (41, 1.4, 60.3),
    'torchvision:shufflenet_v2_x1_5': (299, 3.5, 72.6),
    'mobilenetv2_035': (43, 1.66, 58.2),
    'mobilenetv2_100': (300, 3.4, 72.0),
    'mobilenetv3_small_075': (44, 2.0, 65.4),
    'mobilenetv3_large_100': (219, 5.4, 75.2),
    'semnasnet_100': (312, 3.9, 75.2),
}
SIZES = {'mobilenetv2_035': 192}  # the published checkpoint with this accuracy and this count is the one for 192 px
FC1 = 1024 * 1024
README = ('finet_small_g4', 'finet_small_se_g4', 'finet_large_g4', 'finet_large_se_g4', 'mobilenetv3_large_100')
# Positions of the plot's labels that keep them apart: left of the point, or this much above it.
LEFT = ('mobilenetv3_small_075', 'torchvision:shufflenet_v2_x1_5', 'semnasnet_100', 'mobilenetv2_100')
SHIFT = {'finet_large_se': 5, 'finet_large_g4': -4, 'finet_large_se_g4': 3, 'finet_large_se_g2': -3}


class Elements(TorchDispatchMode):
    """Counts the elements that operators write."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.total = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.names:
            self.total += out.numel()
        return out


def note(name, row, model):
    """Why our figure differs from the paper's."""
    paper_madds, paper_params, _ = PAPER[name]
    madds = row['conv_linear']
    if name.startswith('finet'):
        assert int(row['params_train'] / 1e3) == round(paper_params * 1e3), name
        text = f'the paper leaves out FC1 ({FC1 / 1e6:.2f} M)'
        wider = (madds - FC1) / 1e6 - paper_madds
        if wider > 0.1:
            text += f", and repeats G = 1's figure though the channels are wider ({wider:.2f} M)"
        return text
    if 'shufflenet' in name:
        with_norm = madds + count_flops(model, (3, 224, 224))['other']
        return f'{with_norm / 1e6:.1f} M with BatchNorm at one per element'
    if name.startswith('mobilenetv2'):
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        without = row['params_train'] - sum(p.numel() for m in norms for p in m.parameters(recurse=False))
        size = 'at 192 px, as the accuracy is; ' if name in SIZES else ''
        return f"{size}{without / 1e6:.3f} M parameters without BatchNorm's"
    with torch.no_grad(), Elements('mul', 'hardswish_') as products:
        model(torch.zeros(1, 3, 224, 224))
    total = (madds + products.total) / 1e6
    return f"{total:.1f} M with SE's products and hard-swish at one per element, which fvcore leaves out"


def count(name):
    size = SIZES.get(name, 224)
    row = count_row(name, (3, size, size))
    paper_madds, paper_params, paper_top1 = PAPER[name]
    return dict(
        model=name, input=row['input'], paper_million_madds=paper_madds, madds=row['conv_linear'], other=row['other'],
        uncounted=row['uncounted'], paper_million_params=paper_params, params_train=row['params_train'],
        params_fused=row['params_fused'], paper_top1=f'{paper_top1:g}', note=note(name, row, create(name).eval()),
        fvcore=fvcore.__version__, torchvision=torchvision.__version__, **facts())


def table(rows):
    head = ('', "multiply-adds: paper's, M", 'ours', "parameters: paper's, M", 'ours, train form', 'ours, fused',
            "top-1: paper's", 'why they differ')
    return markdown(head, [
        (f"`{row['model'].removeprefix('torchvision:')}`", row['paper_million_madds'], f"{int(row['madds']):,}",
         row['paper_million_params'], f"{int(row['params_train']):,}", f"{int(row['params_fused']):,}",
         row['paper_top1'], row['note']) for row in rows])


def models(rows):
    """The README's table of some of the networks."""
    chosen = [row for name in README for row in rows if row['model'] == name]
    return markdown(['', 'parameters, fused', 'multiply-adds', "the paper's top-1 on ImageNet"], [
        (f"`{row['model']}`", f"{int(row['params_fused']):,}", f"{int(row['madds']):,}", row['paper_top1'])
        for row in chosen])


def series_of(name):
    return 'other networks' if 'finet' not in name else 'Finet + SE' if '_se' in name else 'Finet'


def plot(rows):
    """Plot the paper's accuracies against the multiply-adds counted here, with a panel for each size."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
    series = {'Finet': ('#1b7fbd', 'D'), 'Finet + SE': ('#0b4a73', 's'), 'other networks': ('#777777', 'o')}
    for ax, title, sizes in zip(axes, ('small', 'large'), ((0, 1e8), (1e8, 1e9))):
        for label, (color, marker) in series.items():
            points = [
                (int(row['madds']) / 1e6, float(row['paper_top1']), row['model']) for row in rows
                if sizes[0] < int(row['madds']) < sizes[1] and label == series_of(row['model'])]
            ax.plot(*zip(*((x, y) for x, y, _ in points)), marker, color=color, label=label, markersize=6)
            for x, y, name in points:
                groups = name[-1] if '_g' in name else '1'
                text = f'G = {groups}' if name.startswith('finet') else name.removeprefix('torchvision:')
                side = -1 if name in LEFT else 1
                ax.annotate(text, (x, y), xytext=(7 * side, SHIFT.get(name, 0)), textcoords='offset points', fontsize=8,
                            va='center', ha='left' if side > 0 else 'right', color=color)
        ax.set(title=title, xlabel='multiply-adds, millions, counted here')
        ax.margins(x=0.2, y=0.1)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 on ImageNet, %, the paper's")
    axes[0].legend(fontsize=8, loc='lower left')
    fig.savefig(RESULTS / 'table2.png', dpi=150, facecolor='white')


def main():
    command_line(__doc__).parse_args()
    write_rows(RESULTS / 'table2.csv', [count(name) for name in PAPER])


if __name__ == '__main__':
    main()
