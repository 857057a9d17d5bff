"""Errors, bytes, resources and launches of the Triton passes, as far as they can be known without a GPU.

    python -m scripts.bench.kernels

This writes to results:
- `kernels_errors.csv`: errors against float64 in Triton's interpreter.
- `kernels_bytes.csv`: bytes that each pass loads and stores, counted in the interpreter, beside the fewest it needs.
- `kernels_resources.csv`: registers, spills and shared memory of every kernel, compiled ahead of time for each card.
- `kernels_launches.csv`: launches of a layer with these passes and with torch's.

gpu.py measures times.
"""
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.report import RESULTS, command, command_line, markdown, write_rows
from timm_finet.ops import moment_form
from timm_finet.ops.moment_form import MomentForm, TorchAlgebra
from timm_finet.ops.reference import fbn_reference
from timm_finet.ops.torch_passes import TorchPasses

SEED = 0
SHAPES = [  # channels, out, G: one shape for each class of tiles
    (6, 24, 1), (25, 100, 1), (50, 50, 2), (100, 100, 4), (200, 100, 2), (200, 400, 8), (400, 200, 2), (1024, 256, 2)]
CARDS = {  # KiB of shared memory that a block may take
    'sm_80': 163, 'sm_86': 99, 'sm_89': 99, 'sm_90': 227, 'gfx942': 64}
RATIOS = (0, 1, 10, 100)
WHAT = ('y', 'mean', 'var', 'grad_x', 'grad_weight', 'grad_gamma', 'grad_beta')


def inputs(channels, out, groups, dtype, ratio=0, shape=(2, 9, 11), device='cpu'):
    """x, weight, gamma, beta and the output's gradient; each channel's mean is `ratio` times its deviation."""
    torch.manual_seed(SEED)
    images, *size = shape
    x = torch.randn(images, channels, *size, device=device) + ratio * torch.randn(channels, 1, 1, device=device).sign()
    weight = torch.randn(out, channels, 1, 1, device=device) / channels ** 0.5
    gamma, beta = torch.rand(groups * out, device=device) + 0.5, torch.randn(groups * out, device=device)
    grad_y = torch.randn(images, out, *size, device=device)
    x, grad_y = (v.to(dtype).contiguous(memory_format=torch.channels_last) for v in (x, grad_y))
    return x, weight, gamma, beta, grad_y


def run_layer(x, weight, gamma, beta, grad_y, groups, relu=False, running=None):
    """The tensors in `WHAT`, from the passes that this process uses."""
    leaves = [v.detach().requires_grad_() for v in (x, weight, gamma, beta) if v is not None]
    y, mean, var, _ = MomentForm.apply(*leaves, *[None] * (4 - len(leaves)), groups, 1e-5, None, relu, running)
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad_y)]


def exact_layer(x, weight, gamma, beta, grad_y, groups, relu=None):
    """The same tensors by definition in float64; `relu` is a mask of the positive outputs."""
    leaves = [v.detach().double().requires_grad_() for v in (x, weight, gamma, beta) if v is not None]
    y, mean, var = fbn_reference(*leaves, *[None] * (4 - len(leaves)), groups, 1e-5)
    y = y if relu is None else y * relu
    return [y.detach(), mean.detach(), var.detach(), *torch.autograd.grad(y, leaves, grad_y.double())]


def errors(found, exact):
    """Relative errors by norm, except for the variance, which has the error of its worst entry."""
    sizes = [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact)]
    sizes[2] = ((found[2] - exact[2]) / exact[2]).abs().max().item()
    return sizes


@contextmanager
def bfloat16_values():
    """Make the interpreter use and round bfloat16 values; it multiplies their bit patterns and truncates float32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder, TensorHandle
    create_dot, cast_impl = Builder.create_dot, Builder.cast_impl

    def dot(self, a, b, *args):
        a, b = (self.cast_impl(v, tl.float32) if v.dtype.scalar == tl.bfloat16 else v for v in (a, b))
        return create_dot(self, a, b, *args)

    def cast(self, value, dtype):
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, value, dtype)
        rounded = torch.as_tensor(value.data.copy()).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view('uint16'), tl.bfloat16)
    with patch.multiple(Builder, create_dot=dot, cast_impl=cast):
        yield


def measure_errors(shape=(50, 40, 2)):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for ratio in RATIOS:
            layer = inputs(*shape, dtype, ratio)
            with bfloat16_values():
                found = run_layer(*layer, shape[2])
            yield dict(dtype=str(dtype)[6:], ratio=ratio, **{
                what: f'{error:.1e}' for what, error in zip(WHAT, errors(found, exact_layer(*layer, shape[2])))})


def on_card(shared_kib=227):
    """Make the Triton passes choose tiles for a GPU with the number of processors of an H100."""
    from timm_finet.ops import triton_passes
    return patch.object(triton_passes, 'card', lambda device: triton_passes.Card(132, shared_kib * 1024))


def by_passes(passes, algebra):
    """Make the moment form use these passes on any device."""
    return patch.object(moment_form, 'implementation', lambda *_: (passes, algebra))


@contextmanager
def recorded_launches(run=True):
    """A list that receives each launch `(kernel, arguments, options)`."""
    from timm_finet.ops.triton_launch import Plan
    launches, launch = [], Plan.launch

    def record(plan, *tensors, floats=()):
        launches.append((plan.kernel, [*tensors, *plan.integers, *floats], plan.constants | plan.options))
        if run:
            launch(plan, *tensors, floats=floats)
    with patch.object(Plan, 'launch', record):
        yield launches


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

@contextmanager
def counted_bytes(kernels):
    """A dict from `(kernel, argument)` to the bytes that the interpreter loads and stores; other kernels do not run."""
    from timm_finet.ops.triton_launch import Plan
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    counts, owners, launch = {}, [], Plan.launch

    def count(ptrs, mask):
        addresses = ptrs.data[mask.data] if mask.data.shape else ptrs.data[None]
        if addresses.size:
            name = next(name for start, end, name in owners if start <= addresses.flat[0] < end)
            counts[name] = counts.get(name, 0) + addresses.size * ptrs.get_element_ty().primitive_bitwidth // 8

    def load(self, ptrs, mask, *args, original=Builder.create_masked_load):
        count(ptrs, mask)
        return original(self, ptrs, mask, *args)

    def store(self, ptrs, value, mask, *args, original=Builder.create_masked_store):
        count(ptrs, mask)
        return original(self, ptrs, value, mask, *args)

    def owned(plan, *tensors, floats=()):
        kernel = plan.kernel
        owners[:] = [
            (v.data_ptr(), v.data_ptr() + v.numel() * v.element_size(), (kernel.fn.__name__, name))
            for v, name in zip(tensors, kernel.arg_names)]
        if kernel.fn.__name__ in kernels:
            launch(plan, *tensors, floats=floats)
    with patch.multiple(Builder, create_masked_load=load, create_masked_store=store), \
            patch.object(Plan, 'launch', owned):
        yield counts


FEWEST = {  # how many times a pass has to load or store x, and how many times y
    'moments_kernel': (1, 0), 'convolve_kernel': (1, 1), 'weight_gradient_kernel': (1, 1),
    'input_gradient_kernel': (2, 1)}
ACTIVATIONS = ('x', 'y', 'grad_x', 'grad_y')
FINET_LARGE = {  # channels, out: layers, and positions of an image of 224 px
    (24, 100): (1, 56 ** 2), (100, 100): (7, 28 ** 2), (100, 200): (1, 28 ** 2), (200, 200): (15, 14 ** 2),
    (200, 400): (1, 14 ** 2), (400, 400): (7, 7 ** 2)}


def run_passes(channels, out, groups, positions):
    """Run the passes with ReLU inside; the values do not matter."""
    from timm_finet.ops.triton_passes import TritonPasses, weight_gradient_parts
    x, weight, _, _, grad_y = inputs(channels, out, 1, torch.float16, shape=(1, 1, positions))
    forward = TritonPasses(x)
    shift, shifted_mean, cov = forward.moments(groups, torch.float32)
    forward.convolve(weight.half(), torch.zeros(groups, out), True)
    backward = TritonPasses(x, shift, grad_y)
    weight_gradient_parts(grad_y, x)
    backward.input_gradient(weight.half(), cov.half(), shifted_mean)


@contextmanager
def one_split(rows):
    """Keep the Triton passes from splitting sums over positions; cached plans are neither used nor left behind."""
    from timm_finet.ops import triton_passes
    kept = triton_passes.plan_moments, triton_passes.plan_weight_gradient
    for plan in kept:
        plan.cache_clear()
    with patch.object(triton_passes, 'split_positions', lambda *args: (1, rows)):
        yield
    for plan in kept:
        plan.cache_clear()


def measure_bytes(groups=4, positions=(128, 256)):
    """Bytes per position in finet_large's layers: of the activations, and of the weights, which caches hold.

    They come from the difference between two numbers of positions, as sums have one part in both cases.
    """
    for (channels, out), (layers, image) in FINET_LARGE.items():
        counts = []
        for n in positions:
            with counted_bytes(FEWEST) as counted, on_card(), one_split(positions[1]):
                run_passes(channels, out, groups, n)
            counts.append(counted)
        for kernel, (times_x, times_y) in FEWEST.items():
            moved = {
                name: (counts[1][k, name] - counts[0][k, name]) / (positions[1] - positions[0])
                for k, name in counts[1] if k == kernel}
            activations = sum(moved.get(name, 0) for name in ACTIVATIONS)
            yield dict(
                channels=channels, out=out, groups=groups, layers=layers, positions=image, kernel=kernel,
                activations=round(activations), fewest=2 * (times_x * channels + times_y * out),
                weights=round(sum(moved.values()) - activations))


# ---------------------------------------------------------------------------------------------------------------------
# Resources

TYPES = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32', torch.int64: '*i64'}


def layer_launches(channels, out, groups, relu=True, shared_kib=227):
    """The launches of a step of a bfloat16 layer with ReLU and running statistics; none of them is run."""
    from timm_finet.ops.triton_passes import TritonAlgebra, TritonPasses
    layer = inputs(channels, out, groups, torch.bfloat16, shape=(256, 28, 28), device='meta')
    running = *torch.empty(2, groups * out, device='meta'), 0.1, torch.empty((), dtype=torch.int64, device='meta')
    with recorded_launches(run=False) as launches, by_passes(TritonPasses, TritonAlgebra), on_card(shared_kib):
        run_layer(*layer, groups, relu=relu, running=running)
    return launches


def compile_for(card, kernel, args, options):
    """Compile a recorded launch for a card; pointers are multiples of 16, like torch's."""
    import triton
    from triton.backends.compiler import GPUTarget
    constants = {name: value for name, value in options.items() if name not in ('num_warps', 'num_stages')}
    types, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = args[i] if i < len(args) else constants[name]
        if isinstance(value, torch.Tensor):
            types[name], aligned[(i,)] = TYPES[value.dtype], [['tt.divisibility', 16]]
        elif name in constants or value is None:
            types[name], constants[name] = 'constexpr', value
        else:
            types[name] = 'fp32' if isinstance(value, float) else 'i32'
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget('cuda', int(card[3:]), 32) if card.startswith('sm_') else GPUTarget('hip', card, 64)
    settings = {name: options[name] for name in ('num_warps', 'num_stages') if name in options}
    return triton.compile(source, target=target, options=settings)


def resources(compiled, card):
    """Registers and spilled bytes per thread, and KiB of shared memory per block."""
    import triton
    if card.startswith('sm_'):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compiled.asm['cubin'])
            file.flush()
            tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
            text = subprocess.run([tool, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = re.search(r'REG:(\d+)', text)[1], re.search(r'STACK:(\d+)', text)[1]
    else:
        text = compiled.asm['amdgcn']
        registers = re.search(r'\.vgpr_count:\s+(\d+)', text)[1]
        spilled = re.search(r'\.private_segment_fixed_size:\s+(\d+)', text)[1]
    return dict(
        registers=int(registers), spilled_bytes=int(spilled), shared_kib=round(compiled.metadata.shared / 1024, 1))


def measure_resources(shapes=SHAPES, cards=CARDS):
    for channels, out, groups in shapes:
        for card in cards:
            for kernel, args, options in layer_launches(channels, out, groups, shared_kib=CARDS[card]):
                yield dict(
                    kernel=kernel.fn.__name__, channels=channels, out=out, groups=groups, card=card,
                    **resources(compile_for(card, kernel, args, options), card))


# ---------------------------------------------------------------------------------------------------------------------
# Launches

class Operators(TorchDispatchMode):
    """Counts the operators that launch at least one kernel; a convolution's backward counts once per gradient."""

    QUIET = ('empty', 'new_empty', 'new_empty_strided', 'empty_like', '_unsafe_view', 'detach', 'promote_types')

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split('::')[1]
        if name == 'convolution_backward':
            self.count += sum(args[-1])
        elif not func.is_view and name not in self.QUIET:
            self.count += 1
        return func(*args, **(kwargs or {}))


def measure_launches(channels=100, out=100, groups=4):
    """Launches of a layer's forward and backward pass in bfloat16, with running statistics, on a GPU.

    They are counted with tensors on the meta device, which take the GPU's code path if `is_cuda` is patched to True.
    """
    from timm_finet.ops.triton_passes import TritonAlgebra, TritonPasses

    def batch_norm(x, weight, gamma, beta, running):
        batches.add_(1)  # as nn.BatchNorm2d does
        y = F.conv2d(x, weight.to(x.dtype))
        return F.relu(F.batch_norm(y, *running, gamma, beta, True))

    def fbn(x, weight, gamma, beta, running):
        return F.relu(MomentForm.apply(x, weight, gamma, beta, groups, 1e-5, None, False, (*running, 0.1, batches))[0])

    def fbn_relu(x, weight, gamma, beta, running):
        return MomentForm.apply(x, weight, gamma, beta, groups, 1e-5, None, True, (*running, 0.1, batches))[0]

    torchs, tritons = (TorchPasses, TorchAlgebra), (TritonPasses, TritonAlgebra)
    for name, layer, passes in (
            ('convolution, BatchNorm, ReLU', batch_norm, torchs), ("FBN, torch's passes, ReLU", fbn, torchs),
            ('FBN, Triton passes, ReLU', fbn, tritons), ('FBN, Triton passes, ReLU inside', fbn_relu, tritons)):
        layer_groups = 1 if layer is batch_norm else groups
        x, weight, gamma, beta, grad_y = inputs(channels, out, layer_groups, torch.bfloat16, device='meta')
        leaves = [v.detach().requires_grad_() for v in (x, weight, gamma, beta)]
        running = torch.empty(2, layer_groups * out, device='meta').unbind()
        batches = torch.empty((), dtype=torch.int64, device='meta')
        with patch.object(torch.Tensor, 'is_cuda', True), by_passes(*passes), on_card(), \
                recorded_launches(run=False) as launches:
            with Operators() as forward:
                y = layer(*leaves, running)
            triton_forward = len(launches)
            with Operators() as backward:
                torch.autograd.grad(y, leaves, grad_y)
        yield dict(
            layer=name, channels=channels, out=out, groups=layer_groups, forward=forward.count + triton_forward,
            backward=backward.count + len(launches) - triton_forward)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def table_of_launches(rows):
    return markdown(['launches of a layer', 'forward', 'backward'],
                    [[row['layer'], row['forward'], row['backward']] for row in rows])


def table_of_bytes(rows):
    def total(kernel, column):
        return 256e-9 * sum(
            int(row['layers']) * int(row['positions']) * int(row[column]) for row in rows if row['kernel'] == kernel)
    cells = [[kernel, *(f'{total(kernel, column):.2f}' for column in ('fewest', 'activations', 'weights'))]
             for kernel in FEWEST]
    sums = [sum(float(cell[column]) for cell in cells) for column in (1, 2, 3)]
    return markdown(
        ['GB per step', 'fewest', 'loads and stores', 'of weights'], cells + [['all', *(f'{s:.2f}' for s in sums)]])


def table_of_resources(rows):
    cells = {}
    for row in rows:
        of = cells.setdefault(row['kernel'], {}).setdefault(row['card'], [0, 0])
        of[:] = max(of[0], int(row['registers'])), max(of[1], float(row['shared_kib']))
    return markdown(['registers / KiB of shared memory', *CARDS], [
        [kernel, *(f'{of[card][0]} / {of[card][1]:g}' for card in CARDS)] for kernel, of in cells.items()])


def table_of_errors(rows):
    return markdown(['dtype', 'mean/deviation', *WHAT],
                    [[row['dtype'], row['ratio'], *(row[what] for what in WHAT)] for row in rows])


MEASURES = dict(
    launches=measure_launches, resources=measure_resources, errors=measure_errors, bytes=measure_bytes)


def main():
    parser = command_line(__doc__)
    parser.add_argument('--only', nargs='+', default=list(MEASURES), choices=MEASURES)
    for name in parser.parse_args().only:
        if name in ('errors', 'bytes') and os.environ.get('TRITON_INTERPRET') != '1':
            # The interpreter has to be switched on before Triton is imported.
            environment = {**os.environ, 'TRITON_INTERPRET': '1', 'TIMM_FINET_TRITON': '1'}
            subprocess.run(
                [sys.executable, '-m', 'scripts.bench.kernels', '--only', name], env=environment, check=True)
        else:
            facts = dict(torch=torch.__version__, triton=version('triton'), date=date.today(), command=command())
            write_rows(RESULTS / f'kernels_{name}.csv', [row | facts for row in MEASURES[name]()])


if __name__ == '__main__':
    main()
