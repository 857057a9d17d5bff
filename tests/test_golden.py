"""The embedded weights' logits on two shipped images, as they were when the weights were recorded."""
import json
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torchvision.transforms.functional import to_tensor

from timm_finet.images import shipped_images

GOLDEN = Path(__file__).with_name('golden_logits.json')
NAMES = [name for name in timm.list_pretrained() if name.startswith(('finet_', 'resnet18_fbn'))]


def logits(model):
    config = model.pretrained_cfg
    images = torch.stack([to_tensor(image) for image in shipped_images()[0][:2]])
    size = config.get('test_input_size') or config['input_size']
    images = F.interpolate(images, size[1:], mode='bilinear')
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.inference_mode():
        return model((images - mean) / std)


@pytest.mark.parametrize('form', [lambda model: model, reparameterize_model], ids=['as trained', 'fused'])
@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_that_were_recorded(name, form):
    """GOLDEN_LOGITS=write records them anew: for new weights, not for a change of the code."""
    found = logits(form(timm.create_model(name, pretrained=True).eval()))
    if os.environ.get('GOLDEN_LOGITS') == 'write':
        recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        recorded[name] = [[round(value, 4) for value in row] for row in found.tolist()]
        GOLDEN.write_text('{\n' + ',\n'.join(
            f'{json.dumps(key)}: {json.dumps(recorded[key])}' for key in sorted(recorded)) + '\n}\n')
    torch.testing.assert_close(found, torch.tensor(json.loads(GOLDEN.read_text())[name]), rtol=1e-3, atol=2e-3)
