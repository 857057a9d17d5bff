"""The moment form, under its former name."""
from .ops.moment_form import MomentForm
from .ops.torch_passes import centred, full_precision, group_products, memory_format, moments_dtype, rows

__all__ = [
    'MomentForm', 'centred', 'full_precision', 'group_products', 'memory_format', 'moments_dtype', 'rows']
