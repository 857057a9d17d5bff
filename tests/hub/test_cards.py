"""Cards: what they say of a network; the committed ones are generated, traceable by figures, and their usage runs."""
import json
import re
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from timm.data import resolve_data_config

from scripts.report import RESULTS, read_rows
from scripts.weights import push_to_hub
from timm_finet import count_flops, fuse_fbn
from timm_finet.data.datasets import CIFAR10, UNKNOWN
from timm_finet.hub.card import dataset_of, licence_section, make_card, metadata, speed_section, training_section
from timm_finet.hub.checkpoint import Run
from timm_finet.hub.pretrained import MODULES
from timm_finet.images import shipped_images

ROOT = Path(__file__).parents[2]
NAMES = timm.list_models(module=MODULES, pretrained=True)


def card_text(name):
    return (ROOT / 'hf_cards' / name / 'README.md').read_text()


def figures(card):
    """The numbers that a card states as measured or counted: in tables, in the model-index, and at the log's end."""
    lines = [line for line in card.splitlines() if line.startswith('|') or 'value:' in line or '% top-1' in line]
    bare = re.sub(r'`[^`]*`|\d+x\d+x\d+|top-\d|b?float16|\[[^]]*\]\([^)]*\)', '', '\n'.join(lines))
    return set(re.findall(r'\d[\d,]*(?:\.\d+)?', bare))


def known_figures(name):
    """The numbers of the results files and the counts of the network."""
    rows = read_rows(RESULTS / 'weights.csv') + read_rows(RESULTS / 'weights_speed.csv')
    values = {value for row in rows if row['model'] == name for value in row.values()}
    last = read_rows(RESULTS / f'{name}.csv')[-1]
    values |= {str(int(last['epoch']) + 1), str(float(last['eval_top1']))}
    values |= {str(value) for value in yaml.safe_load((RESULTS / f'{name}.yaml').read_text()).values()}
    model = timm.create_model(name).eval()
    for form in (model, fuse_fbn(model)):
        counts = count_flops(form, resolve_data_config(model=model, use_test_size=True)['input_size'])
        values |= {f'{counts["params"]:,}', f'{counts["conv"] + counts["linear"]:,}'}
    return values


def test_every_weight_has_a_card():
    cards = {path.name for path in (ROOT / 'hf_cards').iterdir()} - {'space', 'space_browser'}
    assert cards == set(NAMES)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name == 'finet_small_g4.cifar10' else pytest.mark.slow) for name in NAMES])
def test_committed_card_is_the_generated_one(name, tmp_path):
    push_to_hub.write(name, tmp_path)
    for file in ('README.md', 'config.json', 'block.png', 'block_se.png'):
        committed, written = ROOT / 'hf_cards' / name / file, tmp_path / file
        assert written.exists() == committed.exists() and (
            not written.exists() or written.read_bytes() == committed.read_bytes()), 'run scripts.weights.push_to_hub'


@pytest.mark.parametrize('name', NAMES)
def test_every_figure_is_in_the_results(name):
    card, known = card_text(name), known_figures(name)
    stated = figures(card)
    assert len(stated) >= 10 and stated <= known, stated - known
    for figure in stated:  # and one that is not would be seen
        wrong = f'{figure}7' if '.' in figure else f'7{figure}'
        tampered = re.sub(rf'(?<![\d.,]){re.escape(figure)}(?![\d,]|\.\d)', wrong, card)
        assert not figures(tampered) <= known, figure


@pytest.mark.parametrize('name', NAMES)
def test_metadata_and_config_agree(name):
    data = ModelCard(card_text(name)).data
    config = json.loads((ROOT / 'hf_cards' / name / 'config.json').read_text())
    assert (data.library_name, data.pipeline_tag, data.model_name) == ('timm', 'image-classification', name)
    # The Hub has no data set without an owner any more.
    assert all(dataset.count('/') == 1 for dataset in data.datasets or ())
    assert 'transformers' not in data.tags and data.license == config['pretrained_cfg']['license'] == 'other'
    assert data.license_name == 'research-and-teaching' and 'for research and teaching' in card_text(name)
    assert [result.metric_name for result in data.eval_results] == ['Top-1 accuracy', 'Top-5 accuracy']
    cfg = config['pretrained_cfg']
    assert config['model_args']['small_input'] == (cfg['input_size'][-1] <= 32)
    assert len(cfg['label_names']) == config['num_classes']
    assert {result.dataset_split for result in data.eval_results} == {
        'test' if cfg['tag'].startswith('cifar') else 'validation'}


def test_space_names_every_weight_that_it_serves_and_their_data():
    data = yaml.safe_load((ROOT / 'hf_cards' / 'space' / 'README.md').read_text().split('---')[1])
    assert data['models'] == [f'timm-finet/{name}' for name in NAMES]
    assert set(data['datasets']) == {
        dataset for name in NAMES for dataset in ModelCard(card_text(name)).data.datasets or ()}


@pytest.mark.parametrize('name', NAMES)
def test_usage_runs_as_it_stands(name, tmp_path, monkeypatch, capsys):
    usage = re.search(r'```python\n(.*?)```', card_text(name), re.S)[1]
    assert usage.startswith('import timm_finet')
    monkeypatch.chdir(tmp_path)
    shipped_images()[0][0].save('image.png')
    exec(usage, {})
    lines = capsys.readouterr().out.splitlines()
    first = 'airplane' if name.endswith('.cifar10') else r'[\w -]+'
    assert len(lines) == 5 and re.fullmatch(rf'{first} \d+\.\d%', lines[0])


def test_card_of_a_fused_network_tells_its_form_and_the_counts_of_both():
    model = timm.create_model('finet_small_g2', num_classes=3, small_input=True, channels=(16, 16, 16)).eval()
    model.pretrained_cfg.update(input_size=(3, 24, 24), test_input_size=(3, 32, 32))
    train, macs = sum(p.numel() for p in model.parameters()), count_flops(model, (3, 32, 32))
    model = fuse_fbn(model)
    rows = [dict(model='net', form=form, top1=top1, top5=top5) for form, top1, top5 in (
        ('train', '51.25', '90.5'), ('fused', '51.5', '90.75'))]
    made = make_card(model, 'net', 'hf-hub:me/net', results=rows)
    text = made.content
    assert 'These weights are in fused form' in text and 'fuse_fbn(model)' not in text and 'G = 2.' in text
    assert f'\n| parameters | {train:,} | {sum(p.numel() for p in model.parameters()):,} |\n' in text
    macs = f'{macs["conv"] + macs["linear"]:,}'
    assert f'\n| multiply-adds at 3x32x32 | {macs} | {macs} |\n' in text
    assert '.topk(3)' in text and 'at 3x24x24. It knows only 3 classes' in text
    assert [result.metric_value for result in made.data.eval_results] == [51.5, 90.75]
    assert '| train |  | 51.25 | 90.5 |' in text and '| fused |  | 51.5 | 90.75 |' in text


@pytest.mark.parametrize('dataset, tested_on', [
    ('torch/cifar10_first1000', 'test set (CIFAR-10)'),
    ('torch/cifar10_sample', 'validation set (the other 100 of the shipped test images of CIFAR-10)')])
def test_card_names_the_images_that_were_tested_on(dataset, tested_on):
    model = timm.create_model('finet_small', num_classes=10, small_input=True)
    model.pretrained_cfg['tag'] = None
    rows = [dict(model='net', form='train', top1='51.25', top5='90.5')]
    made = make_card(model, 'net', 'hf-hub:me/net', Run(args=dict(dataset=dataset)), rows)
    assert f'Accuracy in percent on the {tested_on}, for' in made.content
    assert made.data.eval_results[0].dataset_name in tested_on


def test_rows_of_a_form_that_are_several_are_refused():
    with pytest.raises(ValueError, match='results has 2 rows for net in fused form'):
        metadata('net', {}, CIFAR10, 'fused', [dict(form=form) for form in ('fused', 'train', 'fused')])


@pytest.mark.parametrize('cfg, args, title', [
    (dict(tag='cifar100'), dict(dataset='torch/cifar10'), 'CIFAR-100'), ({}, dict(dataset='torch/cifar10'), 'CIFAR-10'),
    (dict(tag='cifar10', description='trained on toys'), {}, 'CIFAR-10'),
    (dict(description='trained on toys'), {}, 'toys'), ({}, {}, "the owner's images")])
def test_data_are_those_of_the_tag_before_those_of_the_arguments(cfg, args, title):
    dataset = dataset_of(cfg, args)
    data = metadata('net', dict(license=None), dataset, 'train', [])
    assert dataset.title == title and (data.datasets is not None) == ('CIFAR' in title)


@pytest.mark.parametrize('licence, said', [
    (None, ' The owner has not stated a licence for these weights.'), ('mit', ' These weights are under mit.'),
    ('other', '')])
@pytest.mark.parametrize('dataset, terms', [(CIFAR10, ' The photographs of CIFAR-10 were'), (UNKNOWN, ' Please')])
def test_licence_of_the_weights_and_terms_of_the_photographs_are_told(licence, said, dataset, terms):
    text = licence_section(dict(license=licence), dataset, '')
    assert text.startswith(f'The code of timm-finet is under Apache-2.0.{said}{terms}')
    assert metadata('net', dict(license=licence), dataset, 'train', []).license_name == (
        'research-and-teaching' if licence == 'other' else None)


def test_training_is_told_by_what_is_not_usual_and_by_this_checkpoints_figures():
    cfg = dict(architecture='net', notes=['Noted.'])
    args = dict(epochs=3, world_size=2, grad_accum_steps=1, mixup=0., amp=True, amp_dtype='bfloat16')
    first, settings, weights, log, notes = training_section(
        cfg, Run(args, 'summary.csv', epochs=3, top1=48.256), CIFAR10)
    assert 'CIFAR-10' in first and 'args.yaml' in first and 'summary.csv' in log and notes == 'Noted.'
    assert settings == '| epochs | world_size | amp |\n|---|---|---|\n| 3 | 2 | True |'
    assert weights == 'These are the weights after 3 epochs; train.py measured 48.26% top-1 in bfloat16.'
    first, settings, weights = training_section(
        dict(architecture='net'), Run(dict(epochs=1, grad_accum_steps=4), epochs=1, top1=48.), CIFAR10)
    assert settings.startswith('| epochs | grad_accum_steps |\n')
    assert weights == 'These are the weights after 1 epoch; train.py measured 48.0% top-1.'
    assert training_section(cfg, Run(), CIFAR10) == [
        'Data set: CIFAR-10. The training arguments were not recorded.', 'Noted.']


def test_times_are_told_by_their_quartiles():
    row = dict(form='train', images_per_second='200', ms_low='4.9', ms_high='5.2', img_size='32', threads='1',
               device='a CPU', runtime='PyTorch')
    text = speed_section([row])
    assert '| train | 200 | 4.9 to 5.2 |' in text and 'Batch size 1, 32 px, 1 thread of a CPU, PyTorch' in text
