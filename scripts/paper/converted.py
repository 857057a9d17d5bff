"""For train.py's --device-modules: mobilenetv2_035_converted, timm's MobileNetV2 put through `convert_fbn`."""
import timm
from timm.models import register_model

from timm_finet import convert_fbn


@register_model
def mobilenetv2_035_converted(pretrained=False, fbn_groups=8, small_input=False, **kwargs):
    model = timm.create_model('mobilenetv2_035', pretrained, **kwargs)
    if small_input:  # 32 px end as 4 x 4 positions instead of one
        model.conv_stem.stride = model.blocks[5][0].conv_dw.stride = (1, 1)
    return convert_fbn(model, fbn_groups, inplace=True)
