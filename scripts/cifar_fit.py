"""How well a finished run of cifar_runs.py fits the images that it was trained on."""
import importlib

import torch
import torch.nn.functional as F
from timm.data import create_dataset

from scripts.cifar_runs import dataset_args, folder
from timm_finet.hub.checkpoint import load_checkpoint
from timm_finet.data.cifar import PAD


@torch.no_grad()
def fit(run, args):
    """Loss and top-1 in per cent on the training images, uncropped, in eval mode and float32."""
    setting = run[0]
    if setting.module:
        importlib.import_module(setting.module)
    model, _ = load_checkpoint(str(folder(args.output, run) / 'last.pth.tar'), setting.model)
    cfg = model.pretrained_cfg
    data = create_dataset(dataset_args(setting.dataset, setting.recipe)[1], root=args.data_dir, split='train')
    images, labels = torch.from_numpy(data.data[:, PAD:-PAD, PAD:-PAD]).permute(0, 3, 1, 2), torch.tensor(data.targets)
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    logits = torch.cat([model((part / 255 - mean) / std) for part in images.split(500)])
    return dict(
        fit_loss=round(F.cross_entropy(logits, labels).item(), 4),
        fit_top1=round(100 * (logits.argmax(1) == labels).double().mean().item(), 3))
