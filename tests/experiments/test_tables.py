"""The documents' tables are the results files', and these are what the code gives."""
import re
import sys
from pathlib import Path
from statistics import mean

import pytest

from scripts import tables
from scripts.paper import cifar_tables
from scripts.report import DOCUMENTS, RESULTS, command, read_block, read_rows
from scripts.weights import transfer
from timm_finet.commands.flops import count_row


@pytest.mark.parametrize('name', tables.TABLES)
def test_document_shows_the_results_file(name):
    assert read_block(name) == tables.make(name)


def test_every_marked_place_has_its_table():
    marked = {name for document in DOCUMENTS for name in re.findall(r'<!-- (\w+) -->', document.read_text())}
    assert marked == set(tables.TABLES)


@pytest.mark.parametrize('document', ['README.md', 'docs/cifar.md'])
def test_differences_to_bn_that_the_text_names_are_the_tables(document):
    text = Path(__file__).parents[2].joinpath(document).read_text().split('<!-- cifar_short')[0]
    named = re.findall(r'[+-]\d\.\d\d\s±\s\d\.\d\d', text)
    tables = ''.join(map(read_block, ('cifar_short', 'cifar_long', 'cifar_long_gpu')))
    assert named and not [figure for figure in named if ' '.join(figure.split()) not in tables]


def test_difference_to_tied_parameters_that_the_text_names_is_the_results():
    settings = cifar_tables.tables_of('cifar_short')['cifar100', 'finet_small']
    tied, own = (
        cifar_tables.top1(cifar_tables.of(read_rows(RESULTS / 'cifar_short.csv'), settings[name]).values())
        for name in ('G = 8, tied affine', 'G = 8'))
    difference, error, p = cifar_tables.paired([a - b for a, b in zip(tied, own)])
    text = Path(__file__).parents[2].joinpath('docs', 'cifar.md').read_text()
    assert f'by {difference:.2f} ± {error:.2f} (p = {p:.2f})' in text


def test_gain_of_fine_tuning_that_the_readme_names_is_the_results():
    rows = read_rows(RESULTS / 'transfer.csv')
    tuned, scratch = (
        mean(cifar_tables.top1(row for row in rows if row['setting'].startswith(transfer.IMAGENETTE)
                               and row['setting'].endswith(start))) for start in ('fine-tuned', 'from scratch'))
    text = Path(__file__).parents[2].joinpath('README.md').read_text()
    assert f'{tuned:.1f}% against {scratch:.1f}% from scratch' in ' '.join(text.split())


@pytest.mark.parametrize('name', ['finet_small_se_g4', 'mobilenetv2_035', 'torchvision:shufflenet_v2_x0_5'])
def test_table_2_is_what_is_counted_now(name):
    row = next(row for row in read_rows(RESULTS / 'table2.csv') if row['model'] == name)
    counted = count_row(name, tuple(map(int, row['input'].split('x'))))
    assert counted['conv_linear'] == int(row['madds'])
    assert (counted['params_train'], counted['params_fused']) == (int(row['params_train']), int(row['params_fused']))


@pytest.mark.parametrize('given', [
    ['--output', '/home/me/out'], ['--output=/home/me/out'], ['--output', '/home/me/out/']])
def test_recorded_command_has_names_for_private_paths(given, monkeypatch):
    monkeypatch.setattr(sys, 'orig_argv', ['/home/me/bin/python', '-m', 'scripts.x', *given, '--groups', '4'])
    assert command(OUT='/home/me/out', DATA=None).replace('=', ' ') == 'python -m scripts.x --output OUT --groups 4'
