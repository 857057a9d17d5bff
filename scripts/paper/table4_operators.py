"""Where the time of Table 4 goes: milliseconds per image by kind of operator, from the runtimes' profilers.

    OMP_NUM_THREADS=1 python -m scripts.paper.table4_operators

This uses one thread and writes results/table4_operators.csv. Profilers themselves take time, most of all in eager mode.
"""
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import profile

from scripts.paper.table4 import RUNTIMES, fused, load_openvino
from scripts.report import RESULTS, command_line, facts, markdown, write_rows
from timm_finet.commands.runtimes import to_executorch, to_onnx

NETWORKS = ('finet_large', 'finet_large_se', 'mobilenetv3_large_100')
KINDS = ('convolutions', 'depthwise', 'on pooled maps', 'pooling', 'multiply, add', 'layout', 'other')
RUNS = 50


def kind(operator, pooled=False, depthwise=False):
    """The kind of an operator by its name in any of the runtimes; `pooled` if it works on 1x1 maps or vectors."""
    name = operator.lower()
    if re.search('conv|gemm|linear|fullyconnected|matmul', name):
        depthwise = depthwise or 'group' in name or 'dwconv' in name
        return 'on pooled maps' if pooled else 'depthwise' if depthwise else 'convolutions'
    if re.search('reorder|transpose|copy', name):
        return 'layout'
    if re.search('pool|mean', name):
        return 'pooling'
    if re.search('mul|add|subgraph|eltwise', name):
        return 'multiply, add'
    return 'other'


def onnxruntime(model, x, folder):
    import onnxruntime
    to_onnx(model, x, f'{folder}/model.onnx')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.profile_file_prefix = 1, True, f'{folder}/profile'
    session = onnxruntime.InferenceSession(f'{folder}/model.onnx', options, providers=['CPUExecutionProvider'])
    for _ in range(RUNS):
        session.run(None, {'input': x.numpy()})
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
            name, shapes = event['args']['op_name'], [next(iter(s.values())) for s in event['args']['input_type_shape']]
            pooled = name == 'Gemm' or name == 'Conv' and shapes[0][2:] == [1, 1]
            yield kind(name, pooled, name == 'Conv' and shapes[1][1] == 1), event['dur'] / 1e3 / RUNS


def openvino(model, x, folder):
    to_onnx(model, x, f'{folder}/model.onnx')
    run = load_openvino(f'{folder}/model.onnx', 1, PERF_COUNT=True)
    request = run.request
    operators = request.get_compiled_model().get_runtime_model().get_ops()
    shapes = {op.friendly_name: list(op.output(0).shape) for op in operators if op.outputs()}
    for _ in range(RUNS):
        run(x)
        for event in request.get_profiling_info():
            if event.status == event.Status.EXECUTED:
                pooled = event.node_type == 'FullyConnected' or shapes.get(event.node_name, [0])[2:] == [1, 1]
                yield kind(event.node_type, pooled), event.real_time.total_seconds() * 1e3 / RUNS


def executorch(model, x, folder):
    from executorch.devtools import Inspector
    from executorch.extension.pybindings.portable_lib import _load_for_executorch, _unsafe_reset_threadpool
    to_executorch(model, x, f'{folder}/model.pte')
    _unsafe_reset_threadpool(1)
    module = _load_for_executorch(f'{folder}/model.pte', enable_etdump=True)
    for _ in range(RUNS):
        module.forward([x])
    module.write_etdump_result_to_file(f'{folder}/etdump', '')
    block = next(b for b in Inspector(etdump_path=f'{folder}/etdump').event_blocks if b.name == 'Execute')
    pooled = False  # events have no shapes: maps are 1x1 from a mean to the next product, or to the end
    for event in block.events:
        if event.perf_data and event.name not in ('Method::execute', 'DELEGATE_CALL', 'OPERATOR_CALL'):
            pooled = (pooled or 'Mean' in event.name) and 'Multiply' not in event.name
            yield kind(event.name, pooled), event.perf_data.avg


def eager(model, x, folder):
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.inference_mode(), profile(record_shapes=True) as prof:
        for _ in range(RUNS):
            model(x)
    for event in prof.events():
        if event.cpu_parent is None and event.name.startswith('aten::'):
            shapes = event.input_shapes
            pooled = 'linear' in event.name or shapes[0][2:] == [1, 1]
            depthwise = 'conv' in event.name and shapes[1][1] == 1
            yield kind(event.name, pooled, depthwise), event.cpu_time_total / 1e3 / RUNS


PROFILED = dict(onnxruntime=onnxruntime, openvino=openvino, executorch=executorch, eager=eager)


def measure(runtime, name):
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    totals = dict.fromkeys(KINDS, 0.)
    with tempfile.TemporaryDirectory() as folder:
        for operator_kind, ms in PROFILED[runtime](fused(name), x, folder):
            totals[operator_kind] += ms
    return dict(
        runtime=runtime, model=name, **{k: round(ms, 3) for k, ms in totals.items()}, runs=RUNS, threads=1,
        runtime_version=version(RUNTIMES[runtime][1]), **facts())


def table(rows):
    cells = [
        (RUNTIMES[row['runtime']][0].split(',')[0], f"`{row['model']}`", *(f'{float(row[k]):.2f}' for k in KINDS))
        for row in rows]
    return markdown(('ms per image', '', *KINDS), cells)


def main():
    command_line(__doc__).parse_args()
    torch.set_num_threads(1)
    write_rows(
        RESULTS / 'table4_operators.csv', [measure(runtime, name) for runtime in PROFILED for name in NETWORKS])


if __name__ == '__main__':
    main()
