"""Reproduce Table 4: images per second at batch 1 and 224 px, in five runtimes, with the networks timed in turns.

    OMP_NUM_THREADS=1 python -m scripts.paper.table4 onnxruntime --threads 1

Every network is fused by `fuse_fbn`, which leaves no BatchNorm in any of them; weights are random. ONNX files, also
those for OpenVINO, are written as in `timm-finet export`. A round runs each network ten times and takes the median;
ratios are within a round. Rows are merged into results/table4.csv. This needs the extras export and executorch, and
openvino.
"""
import tempfile
from importlib.metadata import version
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from scripts.report import RESULTS, command_line, facts, markdown, merge_rows
from scripts.timing import in_turns, spread
from timm_finet import fuse_fbn
from timm_finet.commands.flops import create
from timm_finet.commands.runtimes import load_executorch, load_onnx, to_executorch, to_onnx

# Images per second on a Galaxy S10e with PyTorch Mobile, from the paper's Table 4.
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
ROUNDS, RUNS, SEED = 30, 10, 0


def fused(name):
    torch.manual_seed(SEED)
    model = fuse_fbn(create(name).eval(), torch.rand(2, 3, 224, 224))
    assert not any(isinstance(m, _BatchNorm) for m in model.modules()), name
    return model


def load(runtime, name, x, threads, folder):
    """A function that runs one network once."""
    model = fused(name)
    if runtime in ('eager', 'compile'):
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        if runtime == 'compile':
            model = torch.compile(model)
        return lambda: model(x)
    file = f"{folder}/{name.replace(':', '_')}.{'pte' if runtime == 'executorch' else 'onnx'}"
    if runtime == 'executorch':
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        to_executorch(model, x, file)
        _unsafe_reset_threadpool(threads)
        run = load_executorch(file)
    else:
        to_onnx(model, x, file)
        run = (load_onnx if runtime == 'onnxruntime' else load_openvino)(file, threads)
    return lambda: run(x)


def load_openvino(file, threads, **options):
    import openvino
    compiled = openvino.Core().compile_model(file, 'CPU', {
        'INFERENCE_PRECISION_HINT': 'f32',  # else bfloat16 if the processor has it
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', **options})
    request = compiled.create_infer_request()

    def run(x):
        return request.infer([x.numpy()])
    run.request = request
    return run


@torch.inference_mode()
def measure(runtime, threads):
    torch.set_num_threads(threads)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as folder:
        times = in_turns({name: load(runtime, name, x, threads, folder) for name in PAPER}, ROUNDS, RUNS)

    def ratios(base, seconds):
        return [other / mine for other, mine in zip(times[base], seconds)]
    for name, seconds in times.items():
        yield dict(
            runtime=runtime, threads=threads, model=name, **spread('ms', [1e3 * t for t in seconds], 3),
            images_per_second=round(1 / median(seconds), 1),
            **spread('vs_shufflenet', ratios(BASE, seconds), 3),
            **spread('vs_finet_large', ratios('finet_large', seconds), 3),
            paper_vs_shufflenet=round(PAPER[name] / PAPER[BASE], 3), rounds=ROUNDS, runs=RUNS, seed=SEED,
            runtime_version=version(RUNTIMES[runtime][1]), torchvision=version('torchvision'), **facts())


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
    """Plot milliseconds per image as bars by runtime, with a panel for each number of threads."""
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
        ax.set(ylabel='ms per image', title=f"{count} thread{'s' if int(count) > 1 else ''}")
        ax.grid(axis='y', alpha=0.3)
        ax.set_axisbelow(True)
    axes[0][0].legend(fontsize=8, ncols=2)
    fig.savefig(RESULTS / 'table4.png', dpi=130, facecolor='white')


def main():
    parser = command_line(__doc__)
    parser.add_argument('runtime', choices=RUNTIMES)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    merge_rows(RESULTS / 'table4.csv', list(measure(args.runtime, args.threads)),
               ('runtime', 'threads', 'model', 'device'))


if __name__ == '__main__':
    main()
