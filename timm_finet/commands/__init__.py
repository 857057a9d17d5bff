"""The commands of `timm-finet`, one file each."""
