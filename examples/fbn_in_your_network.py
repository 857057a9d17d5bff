"""Use Fine-grained Batch Normalization in your own network: train it, fuse it, compare the outputs.

    python examples/fbn_in_your_network.py
"""
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from timm_finet import FBNConv2d, fuse_fbn
from timm_finet.images import shipped_images


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        FBNConv2d(32, 64, kernel_size=3, stride=2, padding=1, fbn_groups=4), nn.ReLU(),  # convolution and norm in one
        FBNConv2d(64, 128, kernel_size=1, fbn_groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def main() -> None:
    torch.manual_seed(0)
    images, labels = shipped_images()  # 400 test images of CIFAR-10
    x, y = torch.stack([to_tensor(image) for image in images]) * 2 - 1, torch.tensor(labels)
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(10):
        losses = []
        for batch in torch.randperm(len(x)).split(50):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f'epoch {epoch}: loss {mean(losses):.2f}')

    fused = fuse_fbn(model.eval(), x[:2])  # x[:2] is an input to run the network on
    print(f'{model[3]}\nis now {fused[3]}')
    with torch.inference_mode():
        difference = (model(x) - fused(x)).abs().max().item()
    print(f'largest difference of the outputs: {difference:.1e}')


if __name__ == '__main__':
    main()
