"""`export` writes a fused network as an ONNX or ExecuTorch file; the command `timm-finet export` calls it."""
from .commands.export import export

__all__ = ['export']
