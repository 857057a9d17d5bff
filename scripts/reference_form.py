"""For train.py's --device-modules: train FBN in the paper's own form, G times as wide, to see what it costs."""
from timm_finet import FBNConv2d

FBNConv2d.form = 'reference'
