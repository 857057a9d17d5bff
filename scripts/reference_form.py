"""For train.py's --device-modules: train FBN in the paper's own form, G times as wide, to see what it costs.

With this folder in PYTHONPATH: --device-modules timm_finet reference_form
"""
from timm_finet import FBNConv2d

FBNConv2d.form = 'reference'
