"""The paper's facts about the networks: Table 1 and Table 2's counts, exact."""
import pytest
import timm
import torch

from timm_finet import count_flops

# name: parameters, multiply-adds at 224 px after fusion without FC1 (which the paper's column leaves out)
TABLE_2 = {
    'finet_small': (2_388_268, 42_621_472),
    'finet_small_g2': (2_392_588, 42_621_472),
    'finet_small_g4': (2_402_480, 43_603_040),
    'finet_small_se': (2_809_628, 43_034_272),
    'finet_small_se_g2': (2_813_948, 43_034_272),
    'finet_small_se_g4': (2_827_056, 44_019_040),
    'finet_large': (4_434_368, 301_819_712),
    'finet_large_g2': (4_448_768, 301_819_712),
    'finet_large_g4': (4_477_568, 301_819_712),
    'finet_large_se': (5_812_768, 303_184_512),
    'finet_large_se_g2': (5_827_168, 303_184_512),
    'finet_large_se_g4': (5_855_968, 303_184_512),
}
FC1 = 1024 * 1024


@pytest.mark.parametrize('name', TABLE_2)
def test_table_2_counts_are_exact(name):
    params, flops = TABLE_2[name]
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params
    counts = count_flops(timm.create_model(name, fused=True))
    assert counts['conv'] + counts['linear'] == flops + FC1


def test_table_1_output_sizes():
    model = timm.create_model('finet_large', features_only=True).eval()
    shapes = [tuple(x.shape[1:]) for x in model(torch.zeros(1, 3, 224, 224))]
    assert shapes == [(24, 112, 112), (24, 56, 56), (100, 28, 28), (200, 14, 14), (400, 7, 7)]


def test_small_input_keeps_32_pixels_through_the_stem():
    model = timm.create_model('finet_large', features_only=True, small_input=True).eval()
    shapes = [tuple(x.shape[1:]) for x in model(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(24, 32, 32), (24, 32, 32), (100, 16, 16), (200, 8, 8), (400, 4, 4)]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]


@pytest.mark.parametrize('fbn_groups, widths', [(1, (100, 200, 400)), (6, (102, 204, 402)), (8, (104, 200, 400))])
def test_widths_are_rounded_up_to_the_groups(fbn_groups, widths):
    model = timm.create_model('finet_large', fbn_groups=fbn_groups)
    assert tuple(info['num_chs'] for info in model.feature_info[2:]) == widths


@pytest.mark.parametrize('size, groups', [(20, (1, 5, 10, 20)), (50, (1, 2, 4, 8)), (100, (1, 1, 2, 4))])
def test_table_6_fixes_the_channels_a_group(size, groups):
    model = timm.create_model('finet_large', fbn_group_size=size)
    blocks = [model.stages[0][0].conv1, *(stage[-1].conv2 for stage in model.stages)]
    assert tuple(block.fbn_groups for block in blocks) == groups


def test_strided_blocks_have_no_identity():
    model = timm.create_model('finet_small')
    assert [[block.has_identity for block in stage] for stage in model.stages] == [
        [False] + [True] * (depth - 1) for depth in (4, 8, 4)]


def test_default_cfg_is_the_papers():
    cfg = timm.create_model('finet_small_g4').pretrained_cfg
    assert cfg['input_size'] == (3, 224, 224) and cfg['num_classes'] == 1000
    assert cfg['crop_pct'] == 0.875 and cfg['interpolation'] == 'bilinear'
    assert cfg['mean'] == timm.data.IMAGENET_DEFAULT_MEAN and cfg['std'] == timm.data.IMAGENET_DEFAULT_STD
