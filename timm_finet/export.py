"""`export`: a fused network as an ONNX or ExecuTorch file, for programs; the command is `timm-finet export`."""
from .commands.export import export

__all__ = ['export']
