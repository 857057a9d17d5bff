"""The arithmetic of FBN as functions of tensors, and a depthwise convolution with a faster backward pass."""
