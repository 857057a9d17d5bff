"""Fine-tune a Finet as the backbone of a small segmentation network, then fuse it.

    python examples/segmentation.py
"""
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_finet  # registers the networks with timm

CLASSES = 3  # background, disc, square


class Segmenter(nn.Module):
    """Classifies three levels of the backbone's features by 1x1 convolutions, enlarges the results and adds them."""

    def __init__(self, backbone: str):
        super().__init__()
        self.backbone = timm.create_model(backbone, pretrained=True, features_only=True, out_indices=(2, 3, 4))
        self.heads = nn.ModuleList(nn.Conv2d(chs, CLASSES, 1) for chs in self.backbone.feature_info.channels())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [head(features) for head, features in zip(self.heads, self.backbone(x))]
        return sum(F.interpolate(logits, x.shape[2:], mode='bilinear') for logits in maps)


def make_batch(n: int, size: int = 32):
    """Images `(n, 3, size, size)` of a disc or a square, and the class of each pixel `(n, size, size)`."""
    grid, centre, radius = torch.arange(size), torch.randint(8, size - 8, (n, 2, 1, 1)), torch.randint(5, 9, (n, 1, 1))
    dy, dx = (grid[:, None] - centre[:, 0]).abs(), (grid - centre[:, 1]).abs()
    is_disc = torch.rand(n, 1, 1) < 0.5
    inside = torch.where(is_disc, dy ** 2 + dx ** 2 <= radius ** 2, torch.maximum(dy, dx) <= radius)
    background = torch.rand(n, 3, 1, 1)
    images = torch.where(inside[:, None], (background + 0.5) % 1, background) + 0.1 * torch.randn(n, 3, size, size)
    return images * 4 - 2, inside * torch.where(is_disc, 1, 2)


@torch.inference_mode()
def mean_iou(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    guesses = model(x).argmax(1)
    both = [((guesses == c) & (y == c)).sum() for c in range(CLASSES)]
    either = [((guesses == c) | (y == c)).sum() for c in range(CLASSES)]
    return sum(b / e for b, e in zip(both, either)).item() / CLASSES


def main() -> None:
    torch.manual_seed(0)
    model, (x, y) = Segmenter('finet_small_g4.cifar10'), make_batch(100)
    print(f'before: mean IoU {mean_iou(model.eval(), x, y):.2f}')
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(40):
        images, masks = make_batch(16)
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fused = timm_finet.fuse_fbn(model.eval(), x[:2])  # x[:2] is an input to run the network on
    print(f'after: mean IoU {mean_iou(model, x, y):.2f}, fused {mean_iou(fused, x, y):.2f}')


if __name__ == '__main__':
    main()
