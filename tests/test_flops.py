"""`count_flops` and `timm-finet flops`."""
import csv
import re

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from timm_finet import FBNConv2d, count_flops, fuse_fbn
from timm_finet_cli import main
from timm_finet.commands.names import find_names

from test_paper import FC1, TABLE_2


def rows(capsys, *args):
    main(['flops', *args, '--csv'])
    return {row['model']: row for row in csv.DictReader(capsys.readouterr().out.splitlines())}


def test_command_gives_table_2s_counts_to_the_unit(capsys):
    counted = rows(capsys, 'finet_small_g*')
    assert sorted(counted) == sorted(timm.list_models('finet_small_g*'))
    for name in TABLE_2.keys() & counted:
        params, flops = TABLE_2[name]
        assert int(counted[name]['params_train']) == params
        assert int(counted[name]['conv_linear']) == flops + FC1
    assert counted['finet_small_g4']['params_fused'] == '2384088'


@pytest.mark.parametrize('name', ['mobilenetv2_035', 'torchvision:shufflenet_v2_x0_5'])
def test_peers_agree_with_torchs_own_counter(name, capsys):
    model = torchvision.models.shufflenet_v2_x0_5() if ':' in name else timm.create_model(name)
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 224, 224))
    row = rows(capsys, name)[name]
    assert int(row['conv_linear']) == counter.get_total_flops() / 2
    assert int(row['params_train']) == sum(p.numel() for p in model.parameters()) > int(row['params_fused'])


def test_forms_differ_in_batchnorm_alone(capsys):
    fused, train = (rows(capsys, 'resnet18', *args)['resnet18'] for args in ((), ('--train-form',)))
    assert fused['conv_linear'] == train['conv_linear'] and fused['params_train'] == train['params_train']
    assert (fused['form'], train['form']) == ('fused', 'train')
    # one multiply-add an element: 64 x 112 x 112 behind the stem, then the stages' 5, 5, 5, 5 at widths 64 to 512
    elements = 64 * 112 * 112 + 4 * 64 * 56 * 56 + sum(5 * c * s * s for c, s in ((128, 28), (256, 14), (512, 7)))
    assert int(train['other']) - int(fused['other']) == elements


def test_timms_own_reparameterisation_is_the_deploy_form(capsys):
    assert int(rows(capsys, 'mobileone_s0')['mobileone_s0']['params_fused']) == 2_078_504


def test_each_operator_is_counted_once_and_frozen_parameters_too():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert count_flops(net.requires_grad_(False), (3, 8, 8)) == dict(
        conv=3 * 4 * 64, linear=20, other=4 * 64 + 4 * 64, params=16 + 8 + 25, uncounted={})
    assert count_flops(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)) == dict(
        conv=0, linear=60, other=0, params=65, uncounted={})


def test_the_size_is_that_of_the_network_unless_another_is_given():
    model = timm.create_model('finet_small_g4.cifar10')
    assert count_flops(model) == count_flops(model, (3, 32, 32))
    count_flops(timm.create_model('finet_small'), (3, 32, 32))  # the least that it takes
    with pytest.raises(ValueError, match='input_size=None needs a model with a pretrained_cfg'):
        count_flops(nn.Conv2d(3, 4, 1))


@pytest.mark.filterwarnings('error')
def test_counting_says_nothing(caplog):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fbn, self.unused = FBNConv2d(4, 4, 1, fbn_groups=2), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.fbn(x).sigmoid()

    assert count_flops(Net(), (4, 8, 8))['uncounted'] and not caplog.records


def test_unknown_operators_are_listed():
    class Zero(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return Zero.apply(self.conv(x)).sigmoid()

    counts = count_flops(Net(), (3, 8, 8))
    assert counts['conv'] == 3 * 4 * 64 and counts['uncounted'] == {'prim::PythonOp.Zero': 1, 'aten::sigmoid': 1}


def test_mode_stays_and_fused_network_counts_no_norm():
    model = timm.create_model('finet_small', small_input=True).train()
    assert count_flops(model, (3, 32, 32))['conv'] == count_flops(fuse_fbn(model.eval()), (3, 32, 32))['conv']
    model.train()
    count_flops(model)
    assert model.training


def test_table_prints_both_parameter_counts(capsys):
    main(['flops', 'finet_small_g4.cifar10', '--input-size', '3', '64', '64'])
    out = capsys.readouterr().out
    assert re.search(r'finet_small_g4.cifar10 +3x64x64 .* 1,387,730 +1,369,338\n', out) and 'aten::add:13' in out


def test_wildcards_reach_torchvision():
    assert find_names(['torchvision:mnasnet*', 'finet_small', 'finet_small']) == [
        'torchvision:mnasnet0_5', 'torchvision:mnasnet0_75', 'torchvision:mnasnet1_0', 'torchvision:mnasnet1_3',
        'finet_small']


@pytest.mark.parametrize('args, message', [
    (['finet_smal'], "'finet_smal' is unknown: did you mean finet_small"),
    (['squeezenet1_0'], 'did you mean torchvision:squeezenet1_0'),
    (['nothing_like_it*'], r"'nothing_like_it\*' is unknown"),
    (['finet_small.imagenet'], r'tag \(imagenet\) for finet_small'),
    (['finet_small', '--input-size', '3', '31', '224'],
     r'finet_small: input_size=\(3, 31, 224\) is too small.*at least 32 px'),
    (['torchvision:vgg11', '--input-size', '3', '8', '8'], r'input_size=\(3, 8, 8\) does not fit VGG'),
    (['vit_tiny_patch16_224', '--input-size', '3', '240', '240'],
     r'input_size=\(3, 240, 240\) does not fit VisionTransformer'),
    (['finet_small', '--input-size', '1', '64', '64'], r'input_size=\(1, 64, 64\) does not fit Finet'),
])
def test_bad_input_gives_one_line(args, message, refused):
    refused(['flops', *args], message)
