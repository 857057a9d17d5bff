"""torchvision's ShuffleNetV2 under timm's names and arguments, for the comparison in table2_photos.py."""
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torchvision import models

__all__ = ['ShuffleNetV2']


class ShuffleNetV2(models.ShuffleNetV2):
    """With dropout in front of the classifier, as timm's light-weight networks have it."""

    def __init__(self, stages_repeats, stages_out_channels, num_classes=1000, in_chans=3, drop_rate=0.):
        assert in_chans == 3
        super().__init__(stages_repeats, stages_out_channels, num_classes)
        self.num_classes = num_classes
        self.fc = nn.Sequential(nn.Dropout(drop_rate), self.fc)


default_cfgs = generate_default_cfgs({
    name: {'num_classes': 1000} for name in ('shufflenet_v2_x0_5', 'shufflenet_v2_x1_5')})


@register_model
def shufflenet_v2_x0_5(pretrained=False, **kwargs):
    return build_model_with_cfg(
        ShuffleNetV2, 'shufflenet_v2_x0_5', pretrained, stages_repeats=(4, 8, 4),
        stages_out_channels=(24, 48, 96, 192, 1024), **kwargs)


@register_model
def shufflenet_v2_x1_5(pretrained=False, **kwargs):
    return build_model_with_cfg(
        ShuffleNetV2, 'shufflenet_v2_x1_5', pretrained, stages_repeats=(4, 8, 4),
        stages_out_channels=(24, 176, 352, 704, 1024), **kwargs)
