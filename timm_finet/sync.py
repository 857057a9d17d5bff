"""Statistics over several processes, under their former name."""
from .ops.sync import all_reduce, pool_moments, sync_batch_norm

__all__ = ['all_reduce', 'pool_moments', 'sync_batch_norm']
