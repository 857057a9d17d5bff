"""Write a network as an ONNX or ExecuTorch file, in float32 or int8, and load such files."""
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Callable, Dict, Optional

import torch
import torch.nn as nn

__all__ = ['load_executorch', 'load_onnx', 'to_executorch', 'to_onnx']

PACKAGES = {'onnx': 'onnx onnxscript onnxruntime', 'executorch': 'executorch torchao'}  # those of our extras


@contextmanager
def needs(to: str):
    """Turn a missing package into an error that says what to install, and silence the exporters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(None):
            warnings.simplefilter('ignore')
            yield
    except ModuleNotFoundError as error:
        raise RuntimeError(f"--to {to} needs the package {error.name}: pip install {PACKAGES[to]}.") from error
    finally:
        logging.disable(logging.NOTSET)


def to_onnx(
        model: nn.Module, x: torch.Tensor, file: str, calibration: Optional[torch.Tensor] = None,
        metadata: Optional[Dict[str, str]] = None, dynamic_batch: bool = False) -> None:
    """Write a fused `model` for one image shaped like `x` `(1, 3, H, W)`, or for any number of such images.

    Given `calibration` images `(n, 3, H, W)`, the file is int8. `metadata` goes into its `metadata_props`.
    """
    with needs('onnx'):
        import onnx
        import onnxruntime  # noqa: F401 (torch's own message for a missing package is long)
        import onnxscript  # noqa: F401
        if dynamic_batch:  # torch treats a dimension of one as constant
            x = x.repeat(2, 1, 1, 1)
        torch.onnx.export(
            model, (x,), file, input_names=['input'], output_names=['logits'], dynamo=True, external_data=False,
            verbose=False, dynamic_shapes=({0: torch.export.Dim('batch')},) if dynamic_batch else None)
        if calibration is not None:
            quantise_onnx(file, calibration, dynamic_batch)
        if metadata:  # after quantisation, which writes metadata too
            written = onnx.load(file)
            onnx.helper.set_model_props(written, metadata)
            onnx.save(written, file)


def quantise_onnx(file: str, calibration: torch.Tensor, dynamic_batch: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        images = iter(calibration.split(1))

        def get_next(self):
            x = next(self.images, None)
            return None if x is None else {'input': x.numpy()}

    # With torch 2.9 symbolic shape inference fails for a file with a dynamic batch.
    quant_pre_process(file, file, skip_symbolic_shape=dynamic_batch)
    # Weights get 7 bits. On x86 without VNNI instructions, onnxruntime adds products in 16 bits, which 8 bits overflow.
    quantize_static(file, file, Reader(), per_channel=True, reduce_range=True)


def to_executorch(model: nn.Module, x: torch.Tensor, file: str, calibration: Optional[torch.Tensor] = None) -> None:
    """Write a fused `model` for one image, as `to_onnx` does, for ExecuTorch with XNNPACK."""
    with needs('executorch'):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        program = torch.export.export(model, (x,))
        if calibration is not None:
            program = torch.export.export(quantise_executorch(program.module(), calibration), (x,))
        program = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        Path(file).write_bytes(program.to_executorch().buffer)


def quantise_executorch(model: nn.Module, calibration: torch.Tensor) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer, get_symmetric_quantization_config)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    model = prepare_pt2e(model, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    for x in calibration.split(1):
        model(x)
    return convert_pt2e(model)


def load_onnx(file: str, threads: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'input': x.numpy()})[0])


def load_executorch(file: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from executorch.runtime import Runtime
    method = Runtime.get().load_program(file).load_method('forward')
    return lambda x: method.execute([x])[0]
