"""Pushing to the Hub and loading from it: the real client against a stand-in on loopback."""
import argparse
import json
import re
import subprocess
import sys
import threading
import types

import pytest
import timm
import torch
import yaml
from hub_stand_in import cut_download, cut_upload
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import push_to_hf_hub
from timm.utils import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm

from timm_finet import convert_fbn, fuse_fbn
from timm_finet.data.class_names import class_names
from timm_finet.hub import card, save_for_hf
from timm_finet.hub.checkpoint import describe, load_checkpoint
from timm_finet.hub.repository import why_refused
from timm_finet.images import shipped_images

ARGS = dict(
    model='finet_small_g2', model_kwargs=dict(small_input=True, act_place='output'), input_size=[3, 48, 48],
    pretrained=False, dataset='torch/cifar10_pad2', mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=1.0,
    interpolation='bilinear', epochs=3, batch_size=128, world_size=2, grad_accum_steps=1, opt='momentum', lr=0.1,
    seed=7, data_dir='/home/me/cifar', output='/home/me/out',
    resume='/home/me/out/last.pth.tar')
X = torch.randn(2, 3, 32, 32)


def same(a, b):
    torch.testing.assert_close(a.eval()(X), b.eval()(X), rtol=0, atol=0)


@pytest.fixture
def model(randomise):
    return randomise(timm.create_model('finet_small_g2', num_classes=10, **ARGS['model_kwargs'])).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    """What train.py leaves: a checkpoint with its arguments, and its log; the EMA's weights are the model's."""
    raw = timm.create_model('finet_small_g2', num_classes=10, **ARGS['model_kwargs'])
    torch.save(dict(
        state_dict=raw.state_dict(), state_dict_ema={f'module.{k}': v for k, v in model.state_dict().items()},
        args=argparse.Namespace(**ARGS), epoch=2), tmp_path / 'last.pth.tar')
    (tmp_path / 'summary.csv').write_text('epoch,eval_top1\n1,40.5\n2,50.25\n')
    (tmp_path / 'results.csv').write_text(
        'model,form,top1,top5\nfinet_small_g2,train,51.25,90.5\nfinet_small_g2,fused,51.5,90.75\nother,train,1,2\n')
    return tmp_path / 'last.pth.tar'


@pytest.fixture
def push(checkpoint, cli):
    """`timm-finet push` in this process: its exit status and what it printed."""
    def run(*args, path=checkpoint, model='finet_small_g2', repo='me/net'):
        return cli('push', path, '--model', model, '--repo-id', repo, *args)
    return run


def test_timms_own_push_loads_back_bit_identical(hub, model):
    for repo_id, network in (('me/train', model), ('me/fused', fuse_fbn(model))):
        push_to_hf_hub(network, repo_id, safe_serialization=True)
        assert set(hub.repos[repo_id].files()) == {'config.json', 'model.safetensors', 'README.md'}
        same(timm.create_model(f'hf-hub:{repo_id}', pretrained=True), network)


def test_pushed_checkpoint_is_one_commit_with_all_that_belongs_to_it(hub, push, checkpoint, model):
    status, out, err = push('--results', checkpoint.with_name('results.csv'), '--private')
    assert (status, out.strip()) == (0, f"{hub.url}/me/net/commit/{hub.repos['me/net'].branches['main']}"), err
    repo = hub.repos['me/net']
    assert repo.private and len(repo.commits) == 2
    files = repo.files()
    assert set(files) - {'block.png', 'block_se.png'} == {
        'README.md', 'config.json', 'model.safetensors', 'args.yaml', 'summary.csv'}
    assert files['summary.csv'] == checkpoint.with_name('summary.csv').read_bytes()
    args = yaml.safe_load(files['args.yaml'])
    assert args['epochs'] == 3 and not any('/home/me' in str(value) for value in args.values())

    config = json.loads(files['config.json'])
    assert config['architecture'] == 'finet_small_g2' and config['num_classes'] == 10
    assert config['model_args'].items() >= dict(small_input=True, act_place='output', fused=False).items()
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['crop_pct']) == ([3, 48, 48], ARGS['mean'], 1.0)
    assert cfg['label_names'][3] == 'cat' and 'tag' not in cfg and 'file' not in cfg

    card = files['README.md'].decode()
    assert 'license' not in card.split('---')[1] and not cfg.get('license')  # the owner's to choose
    assert "create_model('hf-hub:me/net'" in card and '51.25' in card and 'seed 7' in card
    assert '| epochs | batch_size | world_size | opt | lr |' in card  # 256 images a step

    again = timm.create_model('hf-hub:me/net', pretrained=True)
    same(again, model)
    assert timm.data.resolve_data_config(model=again)['input_size'] == (3, 48, 48)


@pytest.mark.slow
@pytest.mark.parametrize('name, epoch, top1', [('model_best.pth.tar', 5, 48.5), ('last.pth.tar', 7, 47.25)])
def test_a_card_gives_the_accuracy_of_this_checkpoint_and_what_it_began_from(hub, push, checkpoint, name, epoch, top1):
    saved = torch.load(checkpoint, weights_only=False)
    saved.update(epoch=epoch, metric=top1)
    vars(saved['args']).update(pretrained=True, model='finet_large_se_g4.cifar10', model_kwargs={})
    saved['state_dict'] = timm.create_model('finet_large_se_g4.cifar10', pretrained=True).state_dict()
    del saved['state_dict_ema']
    torch.save(saved, checkpoint.with_name(name))
    # of the run that went on: it has the other epochs, and begins with its own
    checkpoint.with_name('summary.csv').write_text('epoch,eval_top1\n6,41.5\n7,47.25\n')
    assert push(path=checkpoint.with_name(name), model='finet_large_se_g4')[0] == 0
    card = hub.repos['me/net'].files()['README.md'].decode()
    assert f'the weights after {epoch + 1} epochs; train.py measured {top1}% top-1' in card
    assert ('47.25' in card) == (top1 == 47.25) and '41.5' not in card
    assert 'Training began from `finet_large_se_g4.cifar10`.' in card
    assert 'The terms of `finet_large_se_g4.cifar10`' in card


@pytest.mark.parametrize('arguments, files', [
    ({}, {'model.safetensors'}), (dict(safe_serialization='both'), {'model.safetensors', 'pytorch_model.bin'}),
    (dict(safe_serialization=False), {'pytorch_model.bin'})])
def test_saved_folder_has_safetensors_unless_others_are_asked_for(arguments, files, model, tmp_path):
    tmp_path.chmod(0o755)
    save_for_hf(model, str(tmp_path), **arguments)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert {path.name for path in tmp_path.iterdir()} == files | {'config.json'}
    same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), model)


@pytest.mark.parametrize('name, change', [
    ('resnet18', lambda model: convert_fbn(model, 2)), ('finet_small_g4', reparameterize_model)])
def test_what_create_model_does_not_rebuild_is_not_saved(name, change, tmp_path):
    network = change(timm.create_model(name, num_classes=5).eval())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f'could not be loaded, .*{name}.* save model.state_dict'):
        save_for_hf(network, str(tmp_path / 'folder'))
    assert not (tmp_path / 'folder').exists() and torch.get_rng_state().equal(state)


@pytest.mark.parametrize('given, size', [
    ({}, [3, 64, 64]), (dict(data_config=dict(input_size=(3, 40, 40))), [3, 40, 40])])
def test_saved_size_is_the_one_for_testing_unless_another_is_given(given, size, model, tmp_path):
    model.pretrained_cfg['test_input_size'] = (3, 64, 64)
    save_for_hf(model, str(tmp_path), **given)
    assert json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']['input_size'] == size


@pytest.mark.slow
def test_fused_push_loads_fused_without_further_arguments(hub, push, model, tmp_path):
    assert push('--fused', '--results', tmp_path / 'results.csv')[0] == 0
    files = hub.repos['me/net'].files()
    assert json.loads(files['config.json'])['model_args']['fused'] and 'value: 51.5' in files['README.md'].decode()
    (tmp_path / 'folder').mkdir()
    for name, content in files.items():
        (tmp_path / 'folder' / name).write_bytes(content)
    for source in ('hf-hub:me/net', f'local-dir:{tmp_path / "folder"}'):
        again = timm.create_model(source, pretrained=True)
        assert not any('running_var' in key for key in again.state_dict())
        same(again, fuse_fbn(model))


@pytest.mark.slow
def test_pushing_twice_changes_nothing(hub, push):
    assert push()[0] == push()[0] == 0
    assert len(hub.repos['me/net'].commits) == 2


@pytest.mark.slow
def test_checkpoint_fine_tuned_from_the_hub_is_pushed_as_it_was_built(hub, push, tmp_path, randomise):
    push()
    tuned = randomise(timm.create_model('hf-hub:me/net', pretrained=True, num_classes=7)).eval()
    args = dict(model='hf-hub:me/net', pretrained=True, dataset='', model_kwargs={}, seed=0)
    torch.save(dict(state_dict=tuned.state_dict(), args=argparse.Namespace(**args)), tmp_path / 'tuned.pth.tar')
    assert push(path=tmp_path / 'tuned.pth.tar', repo='me/tuned')[0] == 0
    again = timm.create_model('hf-hub:me/tuned', pretrained=True)
    same(again, tuned)  # act_place too
    assert 'label_names' not in again.pretrained_cfg and tuple(again.pretrained_cfg['input_size']) == (3, 48, 48)


def test_checkpoint_is_not_tested_at_the_size_of_the_weights_it_began_from():
    model = timm.create_model('finet_large_se_g4.tiny_in200')
    assert model.pretrained_cfg['test_input_size'] == (3, 160, 160)
    describe(model, dict(input_size=[3, 48, 48]))
    assert resolve_data_config(model=model, use_test_size=True)['input_size'] == (3, 48, 48)


@pytest.mark.parametrize('name, kwargs', [('finet_small_g2', dict(small_input=True)), ('test_resnet', {})])
def test_checkpoint_is_built_as_its_arguments_say(name, kwargs, tmp_path):
    eps = dict(bn_eps=1e-3) if kwargs else {}  # which other networks do not all take
    model = timm.create_model(name, num_classes=3, in_chans=1, global_pool='max', **kwargs, **eps)
    args = dict(
        model=name, num_classes=3, in_chans=1, gp='max', model_kwargs=kwargs, img_size=64, dataset='torch/cifar10',
        **eps)
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**args)), tmp_path / 'last.pth.tar')
    built, found = load_checkpoint(str(tmp_path / 'last.pth.tar'), name)
    assert found == args and not any(module.training for module in built.modules())
    assert built.global_pool.pool_type == 'max' and built.num_classes == 3
    cfg = built.pretrained_cfg
    assert (cfg['input_size'], cfg['pool_size'], cfg['num_classes']) == ((1, 64, 64), None, 3)
    assert cfg['label_names'] is None  # CIFAR-10 has ten
    if kwargs:
        assert {m.eps for m in built.modules() if isinstance(m, _BatchNorm)} == {1e-3}
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(built(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize('metric, epoch, said', [
    ('top1', 0, 'after 1 epoch; train.py measured 48.5% top-1'), ('loss', 2, 'after 3 epochs.')])
def test_a_card_without_a_log_says_what_the_checkpoint_knows(metric, epoch, said, push, checkpoint):
    saved = torch.load(checkpoint, weights_only=False)
    saved.update(epoch=epoch, metric=48.5)
    vars(saved['args']).update(eval_metric=metric, world_size=1)
    torch.save(saved, checkpoint)
    checkpoint.with_name('summary.csv').unlink()
    (checkpoint.with_name('names.txt')).write_text('\n'.join([*'abcde', '', *'fghij', '']))  # a blank line is no name
    status, out, err = push('--dry-run', '--class-names', checkpoint.with_name('names.txt'))
    assert status == 0 and said in out and 'summary.csv' not in out and '| world_size |' not in out, err


@pytest.mark.slow
def test_revision_is_a_branch_of_its_own(hub, push, model):
    assert push('--revision', 'v2')[0] == push('--revision', 'v2')[0] == 0
    assert hub.repos['me/net'].files() == {}
    same(timm.create_model('hf-hub:me/net@v2', pretrained=True), model)
    assert "hf-hub:me/net@v2'" in hub.repos['me/net'].files('v2')['README.md'].decode()


def test_dry_run_prints_card_and_files_and_asks_nobody(hub, push):
    status, out, _ = push('--dry-run')
    assert status == 0 and out.startswith('---\n') and 'model.safetensors' in out and 'Would push to me/net' in out
    assert hub.log == []


@pytest.mark.slow
def test_cut_upload_is_taken_up_again(hub, push, model):
    hub.interfere['PUT'] = cut_upload
    assert push()[0] == 0
    same(timm.create_model('hf-hub:me/net', pretrained=True), model)
    assert len(hub.repos['me/net'].commits) == 2


@pytest.mark.slow
def test_killed_push_leaves_nothing_half_done(hub, push, checkpoint, model):
    uploading = threading.Event()
    hub.interfere['PUT'] = lambda request: (request.rfile.read(1000), uploading.set(), request.rfile.read())
    command = ['push', str(checkpoint), '--model', 'finet_small_g2', '--repo-id', 'me/net']
    child = subprocess.Popen([sys.executable, '-m', 'timm_finet', *command])
    assert uploading.wait(300)
    child.kill()
    child.wait()
    assert hub.repos['me/net'].files() == {}
    assert push()[0] == 0
    same(timm.create_model('hf-hub:me/net', pretrained=True), model)


@pytest.mark.slow
@pytest.mark.parametrize('token, repo, message', [
    ('', 'me/net', 'no token for the Hub: run `hf auth login`, or set HF_TOKEN'),
    ('hf_wrong', 'me/net', 'the token is not valid'),
    ('hf_writer', 'you/net', 'you/net: the token has no permission to write to it'),
])
def test_refused_push_says_why_in_one_line(hub, push, checkpoint, monkeypatch, token, repo, message):
    monkeypatch.setenv('HF_TOKEN', token)
    before = checkpoint.read_bytes()
    status, out, err = push(repo=repo)
    assert status == 2 and out == '' and message in err and len(err.splitlines()) == 1, err
    assert hub.repos == {} and checkpoint.read_bytes() == before


@pytest.mark.parametrize('status, said', [
    (401, 'the token is not valid'), (403, 'no permission'), (404, 'no permission'), (429, 'Too many')])
def test_an_answer_of_the_hub_is_told_in_words(status, said):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    assert said in why_refused(HfHubHTTPError('Too many requests', response=response))


def test_push_without_a_network_says_so_in_one_line(push, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')
    status, _, err = push()
    assert status == 2 and 'http://127.0.0.1:1 cannot be reached' in err and len(err.splitlines()) == 1, err


def test_bad_arguments_name_themselves(hub, push, checkpoint, tmp_path, model):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    save_file(fuse_fbn(model).state_dict(), tmp_path / 'fused.safetensors')
    for kwargs, message in (
            (dict(path='no.pth'), "checkpoint='no.pth' does not exist"),
            (dict(path=tmp_path / 'text.pth'), 'text.pth.* cannot be read'),
            (dict(model='finet_smal_g2'), "'finet_smal_g2' is unknown: use one of .*finet_small_g2"),
            (dict(model='finet_large'), 'does not fit finet_large: it was trained as finet_small_g2'),
            (dict(repo='net'), "--repo-id 'net' must be ORG/NAME"),
            (dict(path=tmp_path / 'fused.safetensors'), 'fused form: add --fused'),
    ):
        status, out, err = push(**kwargs)
        assert status == 2 and out == '' and len(err.splitlines()) == 1, err
        assert re.search(message, err), err
    (tmp_path / 'other.csv').write_text('model,top1,top5\nother,1,2\n')
    assert "no row for 'finet_small_g2': it has other" in push('--results', tmp_path / 'other.csv')[2]
    assert 'lacks the columns top5' in (
        (tmp_path / 'other.csv').write_text('model,top1\nother,1\n') and push('--results', tmp_path / 'other.csv')[2])
    assert hub.repos == {}


@pytest.mark.parametrize('content', [b'', b'text', 'truncated', 'folder'])
def test_what_is_no_checkpoint_is_named_in_one_line(content, push, checkpoint, tmp_path):
    path = tmp_path / 'bad.pth.tar'
    if content == 'folder':
        path.mkdir()
    else:
        path.write_bytes(checkpoint.read_bytes()[:5000] if content == 'truncated' else content)
    status, out, err = push(path=path)
    assert status == 2 and out == '' and len(err.splitlines()) == 1, err
    assert f"checkpoint='{path}' {'is a folder' if content == 'folder' else 'cannot be read'}" in err


@pytest.mark.parametrize('args, message', [
    ('', 'does not hold the arguments'), ('[1, 2]', 'does not hold the arguments'),
    ('model: 7', 'does not hold the arguments'),
    ('model: finet_small_g2\nmodel_kwargs: {nonsense: 1}', 'does not fit finet_small_g2: .*nonsense'),
    ('model: finet_small_g2\nmean: [1, 2]', 'does not fit finet_small_g2')])
def test_odd_training_arguments_are_refused_in_one_line(args, message, push, tmp_path):
    (tmp_path / 'args.yaml').write_text(args)
    save_file(timm.create_model('finet_small_g2').state_dict(), tmp_path / 'plain.safetensors')
    status, out, err = push(path=tmp_path / 'plain.safetensors')
    assert status == 2 and out == '' and len(err.splitlines()) == 1 and re.search(message, err), err


@pytest.mark.parametrize('value, message', [
    (7, 'is not a tensor'), (torch.full((10,), torch.nan), 'not finite in head.fc.bias')])
def test_weights_that_are_no_numbers_are_refused(value, message, push, model, tmp_path):
    key = [key for key in model.state_dict() if key.endswith('.bias')][-1]
    torch.save({**model.state_dict(), key: value}, tmp_path / 'bad.pth')
    status, out, err = push(path=tmp_path / 'bad.pth')
    assert status == 2 and out == '' and len(err.splitlines()) == 1 and message.replace('head.fc.bias', key) in err, err


@pytest.mark.parametrize('name, row, found', [
    ('finet_small_g2', 'finet_small_g2.cifar10', True), ('finet_small_g2.cifar10', 'finet_small_g2', True),
    ('finet_small_g2.cifar10', 'finet_small_g2.other', False),
    ('finet_small_g2', 'finet_small_g2_more.cifar10', False)])
def test_results_are_found_with_and_without_a_tag(name, row, found, tmp_path):
    (tmp_path / 'results.csv').write_text(f'model,top1,top5\n{row},51.25,90.5\n')
    if found:
        assert [r['top1'] for r in card.read_results(tmp_path / 'results.csv', name)] == ['51.25']
    else:
        with pytest.raises(ValueError, match=f'no row for {name!r}: it has {row}'):
            card.read_results(tmp_path / 'results.csv', name)


def test_results_of_several_tags_are_not_guessed_at(tmp_path):
    (tmp_path / 'results.csv').write_text('model,top1,top5\nfinet_small.a,1,2\nfinet_small.b,3,4\n')
    with pytest.raises(ValueError, match='rows for finet_small.a, finet_small.b: give one'):
        card.read_results(tmp_path / 'results.csv', 'finet_small')


@pytest.fixture
def own(tmp_path):
    """A checkpoint of a folder with three classes."""
    for name in ('cat', 'ant', 'bee'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        shipped_images()[0][0].save(tmp_path / 'data' / 'train' / name / '0.png')
    args = dict(
        model='finet_small_g2', dataset='', data_dir=str(tmp_path / 'data'), train_split='train', class_map='',
        pretrained=False)

    def save(**more):
        model = timm.create_model('finet_small_g2', num_classes=3)
        namespace = argparse.Namespace(**{**args, **more})
        torch.save(dict(state_dict=model.state_dict(), args=namespace), tmp_path / 'own.pth.tar')
        return tmp_path / 'own.pth.tar'
    return save


def names_of(hub):
    return json.loads(hub.repos['me/net'].files()['config.json'])['pretrained_cfg'].get('label_names')


@pytest.mark.parametrize('by', ['folder', 'class map', 'option'])
def test_names_of_own_classes_are_pushed(by, hub, push, own, tmp_path):
    (tmp_path / 'names.txt').write_text('bee\ncat\nant\n')
    more = dict(class_map=str(tmp_path / 'names.txt')) if by == 'class map' else {}
    status, _, err = push(*(['--class-names', tmp_path / 'names.txt'] if by == 'option' else []), path=own(**more))
    assert status == 0 and '--class-names' not in err
    assert names_of(hub) == (['ant', 'bee', 'cat'] if by == 'folder' else ['bee', 'cat', 'ant'])
    assert b'names.txt' not in hub.repos['me/net'].files()['args.yaml']


@pytest.mark.parametrize('dataset, number, third', [('cifar10_gpu', 10, 'bird'), ('cifar100_pad2', 100, 'baby')])
def test_known_data_sets_name_their_classes(dataset, number, third):
    names = class_names(dict(dataset=f'torch/{dataset}'))
    assert len(set(names)) == number and names[2] == third


def test_class_names_that_are_not_known_are_asked_for(hub, push, own, tmp_path):
    status, _, err = push(path=own(data_dir=str(tmp_path / 'gone')))
    assert status == 0 and '--class-names FILE' in err and names_of(hub) is None
    for number in (2, 4):
        (tmp_path / 'names.txt').write_text('name\n' * number)
        status, _, err = push('--class-names', tmp_path / 'names.txt', path=own())
        assert status == 2 and "--class-names '" in err and f'has {number} names, but the network has 3 classes' in err


def test_state_dict_that_does_not_fit_is_refused(push, tmp_path):
    save_file(timm.create_model('finet_large_g2').state_dict(), tmp_path / 'large.safetensors')
    status, _, err = push(path=tmp_path / 'large.safetensors')
    assert status == 2 and 'does not fit finet_small_g2' in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_cut_download_is_taken_up_again(hub, push, model):
    push()
    timm.create_model('hf-hub:me/net')  # the config alone, so that the next GET is the weights'
    hub.interfere['GET'] = cut_download
    same(timm.create_model('hf-hub:me/net', pretrained=True), model)
    assert [line for line in hub.log if line.startswith('GET') and 'model.safetensors' in line][1:]


def test_checkpoint_of_train_py_loads_its_ema(checkpoint, model):
    same(timm.create_model(
        'finet_small_g2', num_classes=10, checkpoint_path=str(checkpoint), **ARGS['model_kwargs']), model)


@pytest.mark.slow
def test_cards_usage_runs_as_it_stands(hub, push, tmp_path, monkeypatch, capsys):
    push()
    monkeypatch.chdir(tmp_path)
    shipped_images()[0][0].save('image.png')
    exec(re.search(r'```python\n(.*?)```', hub.repos['me/net'].files()['README.md'].decode(), re.S)[1], {})
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.slow
def test_commit_can_be_pinned_and_what_was_loaded_loads_offline_in_timms_scripts(
        hub, push, model, checkpoint, tmp_path, cli, monkeypatch, scripts_run_here):
    push()
    first = hub.repos['me/net'].branches['main']
    save_file(timm.create_model('finet_small_g2', num_classes=10).state_dict(), checkpoint.with_name('new.safetensors'))
    assert push(path=checkpoint.with_name('new.safetensors'))[0] == 0
    assert hub.repos['me/net'].branches['main'] != first
    same(timm.create_model(f'hf-hub:me/net@{first}', pretrained=True), model)
    timm.create_model('hf-hub:me/net', pretrained=True)
    asked = len(hub.log)
    (tmp_path / 'script.py').write_text(
        'import sys, timm\nprint(timm.create_model(sys.argv[2], pretrained=True).num_classes)')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert cli('run', tmp_path / 'script.py', '--model', 'hf-hub:me/net') == (0, '10\n', '')
    assert len(hub.log) == asked


def test_private_and_absent_repositories_are_not_loaded(hub, push, monkeypatch):
    push('--private')
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model('hf-hub:me/none', pretrained=True)
    monkeypatch.setenv('HF_TOKEN', '')
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model('hf-hub:me/net', pretrained=True)
