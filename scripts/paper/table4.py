"""Table 4 again: images a second at batch 1 and 224 px, in five runtimes, the networks taken in turns.

    OMP_NUM_THREADS=1 python -m scripts.paper.table4 onnxruntime --threads 1
    python -m scripts.paper.table4 --table    # docs/table4.md and results/table4.png, from the results file

Every network is fused by `fuse_fbn`, which leaves no BatchNorm in any of them; weights are random. ONNX files are those
of `timm-finet export`, for OpenVINO too. A round runs each network ten times and takes the median; ratios are taken
within a round. Rows are merged into results/table4.csv. Needs the extras export and executorch, and openvino.
"""
import argparse
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from scripts.report import RESULTS, command, cpu_name, markdown, read_rows, write_block, write_rows
from timm_finet import fuse_fbn
from timm_finet.commands.runtimes import load_executorch, load_onnx, to_executorch, to_onnx
from timm_finet.commands.flops import create

# Images a second on a Galaxy S10e with PyTorch Mobile, from the paper's Table 4.
PAPER = {
    'torchvision:shufflenet_v2_x1_5': 7.35,
    'finet_large': 7.80,
    'finet_large_se': 7.69,
    'mobilenetv2_100': 3.98,
    'mobilenetv3_large_100': 5.65,
    'semnasnet_100': 3.77,
}
BASE = 'torchvision:shufflenet_v2_x1_5'
RUNTIMES = {
    'eager': ('PyTorch eager, channels_last', 'torch'),
    'compile': ('torch.compile, channels_last', 'torch'),
    'onnxruntime': ('ONNX Runtime', 'onnxruntime'),
    'openvino': ('OpenVINO, float32', 'openvino'),
    'executorch': ('ExecuTorch, XNNPACK', 'executorch'),
}
RUNS, SEED = 10, 0
FILE = RESULTS / 'table4.csv'


def fused(name):
    torch.manual_seed(SEED)
    model = fuse_fbn(create(name).eval(), torch.rand(2, 3, 224, 224))
    assert not any(isinstance(m, _BatchNorm) for m in model.modules()), name
    return model


def load(runtime, name, x, threads, folder):
    """A function that runs one network once."""
    if runtime in ('eager', 'compile'):
        model = fused(name).to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        if runtime == 'compile':
            model = torch.compile(model)
        return lambda: model(x)
    file = folder / f"{name.replace(':', '_')}.{'pte' if runtime == 'executorch' else 'onnx'}"
    if not file.exists():
        (to_executorch if runtime == 'executorch' else to_onnx)(fused(name), x, str(file))
    if runtime == 'executorch':
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        _unsafe_reset_threadpool(threads)
        run = load_executorch(str(file))
    elif runtime == 'onnxruntime':
        run = load_onnx(str(file), threads)
    else:
        run = load_openvino(file, threads)
    return lambda: run(x)


def load_openvino(file, threads, **options):
    import openvino
    compiled = openvino.Core().compile_model(file, 'CPU', {
        'INFERENCE_PRECISION_HINT': 'f32',  # else bfloat16 where the processor has it
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', **options})
    request = compiled.create_infer_request()

    def run(x):
        return request.infer([x.numpy()])
    run.request = request
    return run


def measure(runtime, threads, rounds, folder):
    """Seconds an image by network, one median a round."""
    torch.set_num_threads(threads)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    runs = {name: load(runtime, name, x, threads, folder) for name in PAPER}
    times = {name: [] for name in runs}
    with torch.inference_mode():
        for i in range(rounds + 1):
            for name, run in runs.items():
                each = []
                for _ in range(RUNS):
                    start = time.perf_counter()
                    run()
                    each.append(time.perf_counter() - start)
                if i:  # the first round warms up
                    times[name].append(median(each))
    return times


def spread(key, values, digits):
    low, _, high = quantiles(values, n=4)
    return {key: round(median(values), digits), f'{key}_low': round(low, digits), f'{key}_high': round(high, digits)}


def rows_of(runtime, threads, rounds, times, folder):
    for name, seconds in times.items():
        yield dict(
            runtime=runtime, threads=threads, model=name, **spread('ms', [1e3 * t for t in seconds], 3),
            images_per_second=round(1 / median(seconds), 1),
            **spread('vs_shufflenet', [base / t for base, t in zip(times[BASE], seconds)], 3),
            **spread('vs_finet_large', [base / t for base, t in zip(times['finet_large'], seconds)], 3),
            paper_vs_shufflenet=round(PAPER[name] / PAPER[BASE], 3), rounds=rounds, runs=RUNS, seed=SEED,
            device=cpu_name(),
            torch=version('torch'), runtime_version=version(RUNTIMES[runtime][1]), timm=version('timm'),
            torchvision=version('torchvision'), date=date.today(), command=command(FOLDER=folder))


def merge(rows):
    """Write rows over those of the same measurement that the results file holds."""
    merged = {}
    for row in [*(read_rows(FILE) if FILE.exists() else []), *rows]:
        merged[tuple(str(row[k]) for k in ('runtime', 'threads', 'model', 'device'))] = row
    order = list(RUNTIMES)
    write_rows(FILE, sorted(merged.values(), key=lambda row: (order.index(row['runtime']), str(row['threads']))))


def table(rows):
    by_run = {}
    for row in rows:
        by_run.setdefault((row['runtime'], row['threads']), {})[row['model']] = row
    others = [name for name in PAPER if name != BASE]
    lines = [(
        "the paper's Galaxy S10e", '', f'{PAPER[BASE]:.2f}', *(f'{PAPER[n] / PAPER[BASE]:.2f}' for n in others),
        f"{PAPER['finet_large'] / PAPER['finet_large_se'] - 1:+.0%}")]
    for (runtime, threads), run in by_run.items():
        lines.append((
            RUNTIMES[runtime][0], threads, run[BASE]['images_per_second'],
            *(f"{float(run[n]['vs_shufflenet']):.2f} ({float(run[n]['vs_shufflenet_low']):.2f}–"
              f"{float(run[n]['vs_shufflenet_high']):.2f})" for n in others),
            f"{1 / float(run['finet_large_se']['vs_finet_large']) - 1:+.0%}"))
    head = ('', 'threads', 'shufflenet_v2_x1_5, images/s', *(f'`{n}`' for n in others), "SE's cost in time")
    return markdown(head, lines)


def plot(rows):
    """Milliseconds an image, bars by runtime, a panel for each number of threads."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    colors = ('#999999', '#1b7fbd', '#0b4a73', '#f2b37c', '#d95f02', '#8c510a')
    threads = sorted({row['threads'] for row in rows})
    fig, axes = plt.subplots(
        len(threads), 1, figsize=(9, 3 * len(threads)), squeeze=False, sharex=True, layout='constrained')
    for ax, count in zip(axes[:, 0], threads):
        for i, (name, color) in enumerate(zip(PAPER, colors)):
            mine = [row for row in rows if row['threads'] == count and row['model'] == name]
            heights = [float(row['ms']) for row in mine]
            errors = [[abs(float(row['ms']) - float(row[f'ms_{end}'])) for row in mine] for end in ('low', 'high')]
            ax.bar([k + (i - 2.5) * 0.14 for k in range(len(mine))], heights, 0.13, yerr=errors, color=color,
                   error_kw=dict(lw=0.8, ecolor='#333333'), label=name.removeprefix('torchvision:'))
        ax.set_xticks(range(len(mine)), [RUNTIMES[row['runtime']][0].replace(', ', '\n') for row in mine])
        ax.set(ylabel='ms an image', title=f"{count} thread{'s' if int(count) > 1 else ''}")
        ax.grid(axis='y', alpha=0.3)
        ax.set_axisbelow(True)
    axes[0][0].legend(fontsize=8, ncols=2)
    fig.savefig(RESULTS / 'table4.png', dpi=130, facecolor='white')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runtime', nargs='?', choices=RUNTIMES)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--folder', type=Path, help='keep exported files here, and use those that are there')
    parser.add_argument('--table', action='store_true', help='write table and plot from the results file and stop')
    args = parser.parse_args()
    if args.table:
        rows = read_rows(FILE)
        write_block('table4', table(rows))
        return plot(rows)
    if args.runtime is None:
        parser.error(f"give a runtime: {', '.join(RUNTIMES)}")
    with tempfile.TemporaryDirectory() as scratch:
        times = measure(args.runtime, args.threads, args.rounds, args.folder or Path(scratch))
    rows = list(rows_of(args.runtime, args.threads, args.rounds, times, args.folder))
    for row in rows:
        print(f"{args.runtime} {args.threads} {row['model']:32} {row['ms']:8.2f} ms  {row['vs_shufflenet']:.3f} of "
              f"ShuffleNetV2's speed ({row['vs_shufflenet_low']:.3f}..{row['vs_shufflenet_high']:.3f})")
    merge(rows)


if __name__ == '__main__':
    main()
