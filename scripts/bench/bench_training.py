"""What FBN costs in training: time and peak memory of one step against plain BN, with the networks timed in turns.

    python -m scripts.bench.bench_training  # CPU, one thread; on a GPU: --device cuda --channels-last --graph

A step is forward, cross entropy and backward, without optimizer. All forms of a network have the same widths: `bn` is
made of torch's nn.Conv2d and nn.BatchNorm2d, `plain` is what this package builds at G = 1, `reference` is FBN in the
paper's form, and `moment` is FBN in this package's form. `run` is eager, compiled, or a CUDA graph of the eager
kernels, which saves the host's time to launch them. Rows are merged into results/bench_training.csv.
"""
from statistics import median

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from scripts.report import RESULTS, command_line, facts, markdown, merge_rows
from scripts.timing import in_turns, peak_bytes
from timm_finet import FBNConv2d
from timm_finet.cuda_graphs import captured
from timm_finet.fbn import ReferenceFBNConv2d
from timm_finet.ops.depthwise import DepthwiseConv2d

KEY = ('model', 'size', 'dtype', 'layout', 'batch', 'groups', 'form', 'device', 'threads', 'run')
FORMS = {  # name, color, marker and line in the plot
    'bn': ("plain BN, torch's modules", '#555555', 'o', '-'),
    'plain': ('plain BN, as built here', '#555555', 'v', ':'),
    'reference': ('FBN, reference form', '#d95f02', 's', '-'),
    'moment': ('FBN, moment form', '#1b7fbd', 'D', '-'),
}
SEED = 0


def torch_conv(layer):
    """torch's own convolution with the sizes of one of this package's layers."""
    return nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        getattr(layer, 'groups', 1), bias=False)


def torch_modules(model):
    """Replace this package's layers in a network at G = 1 by torch's own modules."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, FBNConv2d):
            model.set_submodule(path, nn.Sequential(torch_conv(layer), nn.BatchNorm2d(layer.out_channels)))
        elif isinstance(layer, DepthwiseConv2d):
            model.set_submodule(path, torch_conv(layer))
    return model


def build(name, groups, form, size, layout=torch.channels_last, device='cpu'):
    fbn_groups = 1 if form in ('bn', 'plain') else groups
    if name == 'resnet50':
        model = timm.create_model('resnet50_fbn', fbn_groups=fbn_groups, small_input=size <= 32)
    else:
        widths = [info['num_chs'] for info in timm.create_model(name, fbn_groups=groups).feature_info[2:]]
        model = timm.create_model(name, fbn_groups=fbn_groups, channels=tuple(widths), small_input=size <= 32)
    if form == 'bn':
        model = torch_modules(model)
    for layer in model.modules():
        if isinstance(layer, FBNConv2d) and form == 'reference':
            layer.__class__ = ReferenceFBNConv2d
    return model.to(device, memory_format=layout).train()


def step(model, x, target, dtype):
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    model.zero_grad(set_to_none=True)


def bench(name, size, dtype, args):
    torch.manual_seed(SEED)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(args.batch_size, 3, size, size, device=args.device).to(memory_format=layout)
    target = torch.randint(10, (args.batch_size,), device=args.device)
    runs = {}
    for groups in args.groups:
        for form in args.forms:
            for how in args.runs:
                model = build(name, groups, form, size, layout, args.device)
                if how == 'compiled':
                    model.compile()
                elif how == 'graph':
                    captured(model, x, torch.bfloat16 if dtype == 'bfloat16' else None)
                runs[groups, form, how] = lambda model=model: step(model, x, target, dtype)
    times = in_turns(runs, args.rounds, device=args.device)
    middle = {key: median(values) for key, values in times.items()}
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + x.numel() * x.element_size()
    peaks = {  # not of graphs, which hold their memory from their capture on
        key: held + peak_bytes(run, args.device) for key, run in runs.items() if 'graph' not in key}
    for groups, form, how in runs:
        mine, bn, eager = (groups, form, how), (groups, 'bn', how), (groups, form, 'eager')
        yield dict(
            model=name, size=size, dtype=dtype, layout='channels_last' if args.channels_last else 'contiguous',
            batch=args.batch_size, groups=groups, form=form, ms=round(middle[mine] * 1e3, 1),
            ms_min=round(min(times[mine]) * 1e3, 1), ms_max=round(max(times[mine]) * 1e3, 1),
            peak_mb=round(peaks[mine] / 2 ** 20, 1) if mine in peaks else '',
            time_vs_bn=round(middle[mine] / middle[bn], 3),
            memory_vs_bn=round(peaks[mine] / peaks[bn], 3) if mine in peaks else '',
            time_vs_eager=round(middle[mine] / middle[eager], 3) if mine != eager else '',
            memory_vs_eager=round(peaks[mine] / peaks[eager], 3) if how == 'compiled' else '',
            rounds=args.rounds, seed=SEED, threads=torch.get_num_threads(), run=how, **facts(args.device))


def measured_on(rows, kind):
    return [row for row in rows if ('NVIDIA' in row['device']) == (kind == 'GPU')]


def table(rows, kind='CPU'):
    """Ratios of this package's form and of the reference form to plain BN, at G = 2, 4 and 8."""
    def ratios(rows, form, column, over=None):
        found = {r['groups']: float(r[column]) for r in rows if r['form'] == form and r[column]}
        base = {r['groups']: float(r[column]) for r in rows if r['form'] == over and r[column]}
        return ' / '.join(
            f'{found[g] / base.get(g, 1):.2f}' if g in found and (not over or g in base) else '-'
            for g in ('2', '4', '8'))

    kinds = {}
    for row in measured_on(rows, kind):
        kinds.setdefault(tuple(row[k] for k in KEY if k not in ('groups', 'form')), []).append(row)
    cells = []
    for (name, size, dtype, layout, batch, _, _, how), rows in sorted(
            kinds.items(), key=lambda kind: (kind[0][:-1], kind[0][-1] != 'eager')):
        particulars = [layout] * (layout == 'channels_last') + [how] * (how != 'eager')
        cells.append([', '.join([f'{name}, {size} px, batch {batch}, {dtype}', *particulars]),
                      ratios(rows, 'moment', 'time_vs_bn'), ratios(rows, 'moment', 'ms', over='plain'),
                      ratios(rows, 'reference', 'time_vs_bn'),
                      ratios(rows, 'moment', 'memory_vs_bn'), ratios(rows, 'reference', 'memory_vs_bn')])
    head = [
        'G = 2 / 4 / 8', 'time vs BN', "vs this package's BN", 'reference form', 'peak memory vs BN', 'reference form']
    return markdown(head, cells)


def headline(rows):
    """The README's table: finet_large at G = 4 in channels_last, relative to plain BN."""
    chosen = {
        (r['size'], r['dtype'], r['form']): r for r in measured_on(rows, 'CPU')
        if (r['model'], r['groups'], r['layout'], r['run']) == ('finet_large', '4', 'channels_last', 'eager')}
    cells = []
    for size, dtype in (('32', 'bfloat16'), ('32', 'float32'), ('224', 'bfloat16'), ('224', 'float32')):
        moment, reference, plain = (chosen[size, dtype, form] for form in ('moment', 'reference', 'plain'))
        cells.append([
            f"{size} px, batch {moment['batch']}, {dtype}", *(f'{float(ratio):.2f}' for ratio in (
                moment['time_vs_bn'], float(moment['ms']) / float(plain['ms']), reference['time_vs_bn'],
                moment['memory_vs_bn'], reference['memory_vs_bn']))])
    head = ['a training step, plain BN = 1', 'time', 'over BN as built here', "time, the paper's form", 'peak memory',
            "memory, the paper's form"]
    return markdown(head, cells)


def plot(rows):
    """Plot time and memory in channels_last against G: a line per form, a row per dtype, a column per network."""
    import matplotlib.pyplot as plt  # a machine that only measures does not need it
    rows = [r for r in measured_on(rows, 'CPU') if r['layout'] == 'channels_last' and r['run'] == 'eager']
    panels = sorted({(r['model'], int(r['size']), int(r['batch'])) for r in rows if r['groups'] == '8'})
    dtypes = ('float32', 'bfloat16')
    for column, what in (('time_vs_bn', 'time'), ('memory_vs_bn', 'memory')):
        fig, axes = plt.subplots(
            len(dtypes), len(panels), figsize=(3.0 * len(panels) + 0.6, 2.9 * len(dtypes)), sharex=True, sharey=True,
            squeeze=False, layout='constrained')
        for dtype, line in zip(dtypes, axes):
            for (name, size, batch), ax in zip(panels, line):
                panel = (name, str(size), str(batch), dtype)
                chosen = [r for r in rows if (r['model'], r['size'], r['batch'], r['dtype']) == panel]
                for form, (label, color, marker, style) in FORMS.items():
                    points = sorted((int(r['groups']), float(r[column])) for r in chosen if r['form'] == form)
                    if points:
                        ax.plot(*zip(*points), color=color, marker=marker, ls=style, label=label)
                ax.set(xscale='log', yscale='log', title=f'{name}, {size} px, batch {batch}\n{dtype}')
                ax.set_xticks((2, 4, 8), ('2', '4', '8'))
                ax.minorticks_off()
                ax.grid(alpha=0.3)
        low, high = axes[0][0].get_ylim()
        axes[0][0].set_yticks([y for y in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20) if low <= y <= high * 1.2])
        axes[0][0].yaxis.set_major_formatter('{x:g}x')
        fig.supxlabel('FBN groups G')
        fig.supylabel(f"training step, {what} against plain BN of torch's modules (log scale)")
        fig.legend(*axes[0][0].get_legend_handles_labels(), loc='outside upper center', ncols=len(FORMS))
        fig.savefig(RESULTS / f'bench_training_{what}.png', dpi=150, facecolor='white')


def main():
    parser = command_line(__doc__)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--models', nargs='+', default=['finet_large', 'finet_small', 'resnet50'])
    parser.add_argument('--groups', nargs='+', type=int, default=[2, 4, 8])
    parser.add_argument('--forms', nargs='+', default=list(FORMS), choices=FORMS, help='must include bn')
    parser.add_argument('--sizes', nargs='+', type=int, default=[32, 224])
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'], choices=('float32', 'bfloat16'))
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument(
        '--compile', action='append_const', const='compiled', dest='runs', default=['eager'],
        help='measure each form compiled too, in turns with the eager form')
    parser.add_argument(
        '--graph', action='append_const', const='graph', dest='runs', help='measure each form as a CUDA graph too')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        for size in args.sizes:
            for dtype in args.dtypes:
                merge_rows(RESULTS / 'bench_training.csv', list(bench(name, size, dtype, args)), KEY)


if __name__ == '__main__':
    main()
