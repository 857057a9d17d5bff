"""For train.py's --device-modules: mobilenetv2_050_fbn, timm's MobileNetV2 put through `convert_fbn`."""
import timm
from timm.models import register_model

from timm_finet import convert_fbn


@register_model
def mobilenetv2_050_fbn(pretrained=False, fbn_groups=8, small_input=False, **kwargs):
    model = timm.create_model('mobilenetv2_050', pretrained, **kwargs)
    if small_input:
        model.conv_stem.stride = (1, 1)
    return convert_fbn(model, fbn_groups, inplace=True)
