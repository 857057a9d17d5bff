"""What FBN costs in training: time and peak memory of one step against plain BN, the networks taken in turns.

    python -m scripts.bench.bench_training  # CPU, one thread; on a GPU: --device cuda --channels-last --graph
    python -m scripts.bench.bench_training --models finet_large --groups 4 --layers
    python -m scripts.bench.bench_training --table

A step is forward, cross entropy and backward, without optimizer. `bn` is the same network, of the same widths, of
nn.Conv2d and nn.BatchNorm2d as torch has them; `plain` the same as this package builds it, at G = 1; `reference` the
paper's form; `moment` this package's; `conv`, on demand, has no normalisation behind the FBN convolutions at all, the
floor for any form. `run` is eager, compiled, or a CUDA graph of the eager kernels, without the host's time to launch
them. Rows are merged into results/bench_training.csv.
"""
import argparse
import time
from datetime import date
from statistics import median

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from scripts.report import RESULTS, command, cpu_name, markdown, read_rows, write_block, write_rows
from timm_finet import FBNConv2d
from timm_finet.cuda_graphs import captured
from timm_finet.ops.depthwise import DepthwiseConv2d
from timm_finet.fbn import ReferenceFBNConv2d

FILE = RESULTS / 'bench_training.csv'
FORMS = ('bn', 'plain', 'reference', 'moment')
SEED = 0


def torch_modules(model):
    """A network at G = 1 with nothing of this package in it: what somebody would write who has torch alone."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (FBNConv2d, DepthwiseConv2d)):
            conv = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                getattr(layer, 'groups', 1), bias=False)
            norm = [nn.BatchNorm2d(layer.out_channels)] if isinstance(layer, FBNConv2d) else []
            model.set_submodule(path, nn.Sequential(conv, *norm))
    return model


def build(name, groups, form, args, size):
    fbn_groups = 1 if form in ('bn', 'plain') else groups
    if name == 'resnet50':
        model = timm.create_model('resnet50_fbn', fbn_groups=fbn_groups, small_input=size <= 32)
    else:
        widths = [info['num_chs'] for info in timm.create_model(name, fbn_groups=groups).feature_info[2:]]
        model = timm.create_model(name, fbn_groups=fbn_groups, channels=tuple(widths), small_input=size <= 32)
    if form == 'bn':
        model = torch_modules(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, FBNConv2d) and form == 'reference':
            layer.__class__ = ReferenceFBNConv2d
        elif isinstance(layer, FBNConv2d) and form == 'conv':
            model.set_submodule(path, layer.eval().fuse())
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(args.device).train()


def step(model, x, target, dtype):
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    model.zero_grad(set_to_none=True)


def seconds(run, device):
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run, device):
    """Peak of the bytes that one step allocates above what the model and the batch hold."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == '[memory]')
    peak = held = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    return peak


def bench(name, size, dtype, args):
    torch.manual_seed(SEED)
    x = torch.randn(args.batch_size, 3, size, size, device=args.device)
    if args.channels_last:
        x = x.to(memory_format=torch.channels_last)
    target = torch.randint(10, (args.batch_size,), device=args.device)
    runs = {}
    for groups in args.groups:
        for form in args.forms:
            for how in args.runs:
                model = build(name, groups, form, args, size)
                if how == 'compiled':
                    model.compile()
                elif how == 'graph':
                    captured(model, x, torch.bfloat16 if dtype == 'bfloat16' else None)
                runs[groups, form, how] = lambda model=model: step(model, x, target, dtype)
    times = {key: [] for key in runs}
    for i in range(args.rounds + 1):
        for key, run in runs.items():
            elapsed = seconds(run, args.device)
            if i:  # the first round warms up
                times[key].append(elapsed)
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + x.numel() * x.element_size()
    peaks = {  # a graph holds its memory from its capture on
        key: held + peak_bytes(run, args.device) for key, run in runs.items() if 'graph' not in key}
    device = torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name()
    for groups, form, how in runs:
        mine, bn, eager = (groups, form, how), (groups, 'bn', how), (groups, form, 'eager')
        mid = median(times[mine])
        yield dict(
            model=name, size=size, dtype=dtype, layout='channels_last' if args.channels_last else 'contiguous',
            batch=args.batch_size, groups=groups, form=form, ms=round(mid * 1e3, 1),
            ms_min=round(min(times[mine]) * 1e3, 1), ms_max=round(max(times[mine]) * 1e3, 1),
            peak_mb=round(peaks[mine] / 2 ** 20, 1) if mine in peaks else '',
            time_vs_bn=round(mid / median(times[bn]), 3),
            memory_vs_bn=round(peaks[mine] / peaks[bn], 3) if mine in peaks else '',
            time_vs_eager=round(mid / median(times[eager]), 3) if mine != eager else '',
            memory_vs_eager=round(peaks[mine] / peaks[eager], 3) if how == 'compiled' else '',
            rounds=args.rounds, seed=SEED,
            device=device, threads=torch.get_num_threads(), run=how, torch=torch.__version__,
            timm=timm.__version__, date=date.today(), command=command())


def bench_layers(name, size, dtype, args):
    """Forward and backward of each kind of FBN layer alone, by form."""
    shapes = {}
    model = build(name, args.groups[0], 'reference', args, size)
    for layer in (m for m in model.modules() if isinstance(m, ReferenceFBNConv2d)):
        layer.register_forward_pre_hook(lambda layer, inputs: shapes.setdefault(
            (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], inputs[0].shape[-1]),
            []).append(1))
    with torch.no_grad():
        model(torch.zeros(2, 3, size, size, device=args.device))
    print(f'{name}, G = {args.groups[0]}, batch {args.batch_size}, {dtype}: ms forward + backward\n'
          f'  in   out  k  s  size  layers' + ''.join(f'{form:>11}' for form in FORMS))
    for (cin, cout, kernel, stride, px), count in shapes.items():
        x = torch.randn(args.batch_size, cin, px, px, device=args.device, requires_grad=True)
        if args.channels_last:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        runs = {}
        for form in FORMS:
            layer = (ReferenceFBNConv2d if form == 'reference' else FBNConv2d)(
                cin, cout, kernel, stride, kernel // 2, fbn_groups=1 if form == 'plain' else args.groups[0])
            if form == 'bn':
                layer = nn.Sequential(
                    nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout))
            layout = torch.channels_last if args.channels_last else torch.contiguous_format
            layer = layer.to(args.device, memory_format=layout)

            def run(layer=layer):
                with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'):
                    y = layer(x)
                y.backward(torch.ones_like(y))
            runs[form] = run
        times = {form: [] for form in runs}
        for _ in range(args.rounds):
            for form, run in runs.items():
                times[form].append(seconds(run, args.device))
        print(f'{cin:>4}  {cout:>4}  {kernel}  {stride}  {px:>4}  {len(count):>6}'
              + ''.join(f'{median(times[form]) * 1e3:11.2f}' for form in FORMS))


KEY = ('model', 'size', 'dtype', 'layout', 'batch', 'groups', 'form', 'device', 'threads', 'run')


def merge(rows):
    """Write rows over those of the same measurement that the results file holds."""
    merged = {tuple(row[k] for k in KEY): row for row in read_rows(FILE)} if FILE.exists() else {}
    merged.update({tuple(str(row[k]) for k in KEY): row for row in rows})
    write_rows(FILE, list(merged.values()))


def measured_on(rows, kind):
    return [row for row in rows if ('NVIDIA' in row['device']) == (kind == 'GPU')]


def table(rows, kind='CPU'):
    """Against plain BN: this package's form and the reference form at G = 2, 4, 8; and what plain BN itself gains."""
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
        cells.append([f"{name}, {size} px, batch {batch}, {dtype}"
                      f"{', channels_last' if layout == 'channels_last' else ''}"
                      f"{', ' + how if how != 'eager' else ''}",
                      ratios(rows, 'moment', 'time_vs_bn'), ratios(rows, 'moment', 'ms', over='plain'),
                      ratios(rows, 'reference', 'time_vs_bn'),
                      ratios(rows, 'moment', 'memory_vs_bn'), ratios(rows, 'reference', 'memory_vs_bn')])
    head = [
        'G = 2 / 4 / 8', 'time vs BN', "vs this package's BN", 'reference form', 'peak memory vs BN', 'reference form']
    return markdown(head, cells)


def headline(rows):
    """finet_large at G = 4, channels_last, over plain BN: the README's table."""
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


LINES = {  # form: name, color, marker, line
    'bn': ("plain BN, torch's modules", '#555555', 'o', '-'),
    'plain': ('plain BN, as built here', '#555555', 'v', ':'),
    'reference': ('FBN, reference form', '#d95f02', 's', '-'),
    'moment': ('FBN, moment form', '#1b7fbd', 'D', '-'),
}


def plot(models):
    """Time and memory in channels_last against G, a form a line: a row a dtype, a column a network and its input."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows = [r for r in measured_on(read_rows(FILE), 'CPU')
            if r['model'] in models and r['layout'] == 'channels_last' and r['run'] == 'eager']
    panels = sorted({(r['model'], int(r['size']), int(r['batch'])) for r in rows if r['groups'] == '8'})
    dtypes = ('float32', 'bfloat16')
    for column, what in (('time_vs_bn', 'time'), ('memory_vs_bn', 'memory')):
        fig, axes = plt.subplots(
            len(dtypes), len(panels), figsize=(3.0 * len(panels) + 0.6, 2.9 * len(dtypes)), sharex=True, sharey=True,
            squeeze=False, layout='constrained')
        for dtype, line in zip(dtypes, axes):
            for (name, size, batch), ax in zip(panels, line):
                chosen = [r for r in rows if (r['model'], int(r['size']), int(r['batch']), r['dtype']) == (
                    name, size, batch, dtype)]
                for form, (label, color, marker, style) in LINES.items():
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
        fig.legend(*axes[0][0].get_legend_handles_labels(), loc='outside upper center', ncols=len(LINES))
        fig.savefig(RESULTS / f'bench_training_{what}.png', dpi=150, facecolor='white')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--models', nargs='+', default=['finet_large', 'finet_small', 'resnet50'])
    parser.add_argument('--groups', nargs='+', type=int, default=[2, 4, 8])
    parser.add_argument('--forms', nargs='+', default=list(FORMS), choices=(*FORMS, 'conv'))
    parser.add_argument('--sizes', nargs='+', type=int, default=[32, 224])
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'], choices=('float32', 'bfloat16'))
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument(
        '--compile', action='append_const', const='compiled', dest='runs', default=['eager'],
        help='measure each form compiled too, in turns with itself eager')
    parser.add_argument(
        '--graph', action='append_const', const='graph', dest='runs', help='and as a CUDA graph')
    parser.add_argument('--layers', action='store_true', help='time each kind of FBN layer alone instead')
    parser.add_argument(
        '--table', action='store_true', help="make the plots and the documents' tables from the results file and stop")
    args = parser.parse_args()
    if args.table:
        rows = read_rows(FILE)
        write_block('bench_training', table(rows))
        write_block('bench_training_gpu', table(rows, 'GPU'))
        write_block('headline', headline(rows))
        return plot(args.models)
    if 'bn' not in args.forms:
        parser.error("--forms must include bn: everything is compared with it")
    torch.set_num_threads(args.threads)
    for name in args.models:
        for size in args.sizes:
            for dtype in args.dtypes:
                if args.layers:
                    bench_layers(name, size, dtype, args)
                    continue
                rows = list(bench(name, size, dtype, args))
                for r in rows:
                    print(f"{name} {size} px {dtype} {r['layout']} batch {r['batch']} G={r['groups']} {r['form']:>9}"
                          f"{r['run']:>9}: "
                          f"{r['ms']:9.1f} ms ({r['time_vs_bn']:.2f}x)  "
                          f"{r['peak_mb']:>8} MB ({r['memory_vs_bn'] or '-'}x)",
                          flush=True)
                merge(rows)


if __name__ == '__main__':
    main()
