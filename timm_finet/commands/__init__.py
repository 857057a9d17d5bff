"""The command `timm-finet`: a file for each of its commands, and what they print, draw and refuse."""
