"""Which weights `pretrained=True` means, and that nothing else is ever loaded, random weights least of all."""
import hashlib
import warnings

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from timm.models import PretrainedCfg, _registry, push_to_hf_hub, save_for_hf
from timm.models._factory import resolve_model_input_args

from timm_finet import finet
from timm_finet.hub import pretrained

EMBEDDED = [
    'finet_large_se_g4.cifar10', 'finet_large_se_g4.cifar100', 'finet_large_se_g4.tiny_in200',
    'finet_small_g4.cifar10', 'finet_small_se_g4.tiny_in200', 'resnet18_fbn.cifar10']
X = torch.randn(2, 3, 32, 32)


def same(a, b):
    torch.testing.assert_close(a.eval()(X), b.eval()(X), rtol=0, atol=0)


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Register a tag as `register_model` would, with its sha256 recorded in an empty folder for embedded weights."""
    monkeypatch.setattr(pretrained, 'WEIGHTS', tmp_path)
    (tmp_path / 'SHA256SUMS').write_text('')

    def apply(name, model, **cfg):
        architecture, tag = name.split('.')
        cfg = PretrainedCfg(architecture=architecture, tag=tag, num_classes=6, description='trained on toys', **{
            'input_size': (3, 32, 32), 'first_conv': 'stem.conv', 'classifier': 'classifier', **cfg})
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)
        monkeypatch.setitem(
            _registry._model_with_tags, architecture, [*_registry._model_with_tags[architecture], name])
        monkeypatch.setattr(_registry, '_model_has_pretrained', _registry._model_has_pretrained | {name})
        save_file(model.state_dict(), tmp_path / 'saved')
        content = (tmp_path / 'saved').read_bytes()
        with (tmp_path / 'SHA256SUMS').open('a') as sums:
            sums.write(f'{hashlib.sha256(content).hexdigest()}  {name}.safetensors\n')
        if 'file' in cfg.to_dict():
            (tmp_path / f'{name}.safetensors').write_bytes(content)
    return apply


def test_a_missing_record_of_the_weights_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, 'WEIGHTS', tmp_path)
    with pytest.raises(FileNotFoundError, match='SHA256SUMS.*is missing'):
        timm.create_model('finet_small_g4.cifar10', pretrained=True)


@pytest.fixture
def trained(randomise):
    return randomise(timm.create_model('finet_large_se_g2', num_classes=6, small_input=True)).eval()


def test_untrained_default_is_the_papers_network():
    model = timm.create_model('finet_small_g4')
    assert (model.num_classes, model.pretrained_cfg['input_size']) == (1000, (3, 224, 224))
    assert isinstance(model.pool, torch.nn.MaxPool2d)


@pytest.mark.parametrize('size, is_small', [((32, 32), True), ((24, 32), True), ((33, 33), False), ((32, 64), False)])
def test_the_small_stem_is_for_images_up_to_32_px(size, is_small):
    model = timm.create_model('finet_small_g4', pretrained_cfg_overlay=dict(input_size=(3, *size)))
    assert isinstance(model.pool, torch.nn.Identity) == is_small


@pytest.mark.parametrize('by_script', [False, True])
def test_without_a_tag_the_best_weights_come_with_one_warning(by_script):
    with pytest.warns(UserWarning) as caught:
        if by_script:  # as timm's newer scripts do, which look the cfg up by themselves
            model = timm.create_model(**resolve_model_input_args('finet_small_g4'), pretrained=True)
        else:
            model = timm.create_model('finet_small_g4', pretrained=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert 'finet_small_g4.cifar10, trained on CIFAR-10, 10 classes, input 3x32x32' in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same(model, timm.create_model('finet_small_g4.cifar10', pretrained=True))
    assert isinstance(model.pool, torch.nn.Identity)


def test_a_tag_that_timms_scripts_look_up_is_the_one_that_is_loaded():
    name = 'finet_large_se_g4.cifar100'  # not the best
    by_script = timm.create_model(**resolve_model_input_args(name), pretrained=True)
    same(by_script, timm.create_model(name, pretrained=True))


def test_without_a_tag_photographs_come_before_cifar():
    with pytest.warns(UserWarning, match='gives finet_large_se_g4.tiny_in200, trained on Tiny.*, input 3x160x160'):
        assert timm.create_model('finet_large_se_g4', pretrained=True).num_classes == 200


@pytest.mark.parametrize('name, message', [
    ('finet_large_se_g2', f'finet_large_se_g2 has no pretrained weights. These exist: {", ".join(EMBEDDED)}'),
    ('resnet50_fbn', f'resnet50_fbn has no pretrained weights. These exist: {", ".join(EMBEDDED)}'),
    ('finet_small_g4.cifar100', "finet_small_g4 has no pretrained weights of tag 'cifar100': use cifar10"),
    ('finet_small_g4.untrained', "finet_small_g4 has no pretrained weights of tag 'untrained': use cifar10"),
])
def test_weights_that_do_not_exist_are_an_error_that_lists_those_that_do(name, message):
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(name, pretrained=True)


def test_listed_weights_load_and_are_all():
    names = timm.list_pretrained('*finet*') + timm.list_pretrained('*_fbn*')
    assert names == EMBEDDED
    for name in names:
        assert timm.create_model(name, pretrained=True).pretrained_cfg['tag'] == name.split('.')[1]


def test_new_tag_just_works_and_in1k_comes_before_others(register, trained, randomise):
    register('finet_large_se_g2.toys', trained, file='embedded')
    with pytest.warns(UserWarning, match='finet_large_se_g2.toys, trained on toys, 6 classes, input 3x32x32'):
        same(timm.create_model('finet_large_se_g2', pretrained=True), trained)
    imagenet = randomise(timm.create_model('finet_large_se_g2', num_classes=6)).eval()
    register('finet_large_se_g2.in1k', imagenet, file='embedded', input_size=(3, 224, 224))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same(timm.create_model('finet_large_se_g2', pretrained=True), imagenet)
        same(timm.create_model('finet_large_se_g2.toys', pretrained=True), trained)


def test_small_images_tag_of_a_resnet_builds_the_small_stem(register, randomise):
    model = randomise(timm.create_model('resnet18_fbn', num_classes=6, small_input=True)).eval()
    register('resnet18_fbn.toys', model, file='embedded', first_conv='conv1', classifier='fc')
    same(timm.create_model('resnet18_fbn.toys', pretrained=True), model)


def test_embedded_file_comes_before_the_hub_and_the_hub_stands_in_for_it(hub, register, trained, tmp_path):
    register('finet_large_se_g2.toys', trained, file='embedded', hf_hub_id='me/toys')
    same(timm.create_model('finet_large_se_g2.toys', pretrained=True), trained)
    assert hub.log == []
    (tmp_path / 'finet_large_se_g2.toys.safetensors').unlink()
    push_to_hf_hub(trained, 'me/toys', safe_serialization=True)
    same(timm.create_model('finet_large_se_g2.toys', pretrained=True), trained)
    assert timm.create_model('finet_large_se_g2.toys', pretrained=True, in_chans=1, num_classes=2).num_classes == 2


def test_weights_on_the_hub_must_have_the_recorded_sha256(hub, register, trained, randomise):
    push_to_hf_hub(trained, 'me/toys', safe_serialization=True)
    pinned = hub.repos['me/toys'].branches['main']
    push_to_hf_hub(randomise(trained), 'me/toys', safe_serialization=True)
    register('finet_large_se_g2.toys', trained, hf_hub_id='me/toys')
    same(timm.create_model('finet_large_se_g2.toys', pretrained=True), trained)
    hub.repos['me/toys'].branches['main'] = pinned
    message = 'sha256 is not the one recorded for finet_large_se_g2.toys.safetensors.*me/toys again'
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('finet_large_se_g2.toys', pretrained=True)


def test_weights_on_the_hub_are_of_the_revision_and_in_the_cache_that_are_given(hub, register, trained, tmp_path):
    push_to_hf_hub(trained, 'me/toys', safe_serialization=True)
    first = hub.repos['me/toys'].branches['main']
    register('finet_large_se_g2.toys', trained, hf_hub_id=f'me/toys@{first}')
    push_to_hf_hub(timm.create_model('finet_small'), 'me/toys', safe_serialization=True)
    same(timm.create_model('finet_large_se_g2.toys', pretrained=True, cache_dir=str(tmp_path / 'cache')), trained)
    assert list((tmp_path / 'cache').rglob('model.safetensors'))


def test_pickled_weights_on_the_hub_are_not_loaded(hub, register, trained):
    push_to_hf_hub(trained, 'me/toys', safe_serialization=False)
    register('finet_large_se_g2.toys', trained, hf_hub_id='me/toys')
    with pytest.raises(EntryNotFoundError):
        timm.create_model('finet_large_se_g2.toys', pretrained=True)


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'altered', 'unrecorded'])
def test_damaged_embedded_weights_are_refused(damage, register, trained, tmp_path):
    register('finet_large_se_g2.toys', trained, file='embedded')
    weights = tmp_path / 'finet_large_se_g2.toys.safetensors'
    if damage == 'missing':
        weights.unlink()
    elif damage == 'unrecorded':
        (tmp_path / 'SHA256SUMS').write_text('')
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[:1000] if damage == 'truncated' else content[:-1] + bytes([content[-1] ^ 1]))
    error = FileNotFoundError if damage == 'missing' else RuntimeError
    with pytest.raises(error, match=f'{weights.name}.*(missing|damaged).*Reinstall'):
        timm.create_model('finet_large_se_g2.toys', pretrained=True)


def test_own_sources_stay(trained, tmp_path):
    save_file(trained.state_dict(), tmp_path / 'own.safetensors')
    for overlay in (dict(file=str(tmp_path / 'own.safetensors')), dict(state_dict=trained.state_dict())):
        same(timm.create_model(
            'finet_large_se_g2', pretrained=True, small_input=True,
            pretrained_cfg_overlay=dict(overlay, num_classes=6)), trained)
        same(timm.create_model(
            'finet_large_se_g2', pretrained=True, small_input=True,
            pretrained_cfg=dict(overlay, num_classes=6, first_conv='stem.conv', classifier='classifier')), trained)
    with pytest.raises(RuntimeError, match='No pretrained weights exist for finet_large_se_g2'):
        timm.create_model('finet_large_se_g2', pretrained=True, pretrained_cfg=dict(num_classes=6))


def test_the_stem_is_saved_whatever_size_is_saved_with_it(trained, tmp_path):
    for i, model in enumerate((trained, timm.create_model('finet_small_se_g2', num_classes=6).eval())):
        config = dict(input_size=(3, (64, 32)[i], 32))
        save_for_hf(model, str(tmp_path / str(i)), safe_serialization=True, data_config=config)
        same(timm.create_model(f'local-dir:{tmp_path / str(i)}', pretrained=True), model)


@pytest.mark.parametrize('name', ['finet_small_g4', 'finet_small_g4.cifar10'])
@pytest.mark.parametrize('argument, value, right', [
    ('act_place', 'output', 'depthwise'), ('act_place', 'pointwise', 'depthwise'), ('small_input', False, True)])
@pytest.mark.filterwarnings('ignore:finet_small_g4 has no ImageNet weights')
def test_arguments_that_make_another_function_of_the_weights_are_refused(name, argument, value, right):
    with pytest.raises(ValueError, match=f"{argument}={value!r} .*finet_small_g4.* {argument}={right!r}"):
        timm.create_model(name, pretrained=True, **{argument: value})
    assert timm.create_model(name, **{argument: value}).num_classes
    timm.create_model(name, pretrained=True, **{argument: right})


def test_overlay_does_not_change_the_stem_that_weights_were_trained_with():
    overlay = dict(input_size=(3, 64, 64))
    larger = timm.create_model('finet_small_g4.cifar10', pretrained=True, pretrained_cfg_overlay=overlay)
    same(larger, timm.create_model('finet_small_g4.cifar10', pretrained=True))


def test_arguments_against_those_saved_with_the_weights_are_refused(randomise, tmp_path):
    model = randomise(timm.create_model('finet_small_g4', num_classes=6, small_input=True, act_place='output')).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), model)
    with pytest.raises(ValueError, match="act_place='depthwise'.*act_place='output'"):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, act_place='depthwise')


def test_weights_keep_their_function_when_a_default_changes(monkeypatch, tmp_path, randomise):
    before = timm.create_model('finet_small_g4.cifar10', pretrained=True)
    own = randomise(timm.create_model('finet_small_g2', num_classes=6, small_input=True)).eval()
    save_for_hf(own, str(tmp_path), safe_serialization=True)
    defaults = finet.Finet.__init__.__defaults__
    monkeypatch.setattr(
        finet.Finet.__init__, '__defaults__', tuple('output' if v == 'depthwise' else v for v in defaults))
    assert isinstance(timm.create_model('finet_small_g2').stages[0][0].act_out, torch.nn.ReLU)
    same(timm.create_model('finet_small_g4.cifar10', pretrained=True), before)
    same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), own)
    assert set(timm.list_pretrained('finet*')) == set(finet.TRAINED_WITH)
