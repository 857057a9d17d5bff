"""The committed cards: generated, traceable figure by figure, and with a usage that runs."""
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


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow][:i]) for i, name in enumerate(NAMES)])
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
