"""The documents' tables are the results files', and these are what the code gives."""
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / 'scripts'))
import bench_training  # noqa: E402
import int8  # noqa: E402
import table2  # noqa: E402
import table4  # noqa: E402
import table4_operators  # noqa: E402
import validate_weights  # noqa: E402
from report import RESULTS, read_block, read_rows  # noqa: E402
from timm_finet.flops import count_row  # noqa: E402


@pytest.mark.parametrize('script', [bench_training, table2, table4, table4_operators, int8])
def test_document_shows_the_results_file(script):
    name = script.__name__
    assert read_block(name) == script.table(read_rows(RESULTS / f'{name}.csv'))


def test_readmes_own_tables_are_the_results_files():
    def rows(name):
        return read_rows(RESULTS / f'{name}.csv')

    assert read_block('headline') == bench_training.headline(rows('bench_training'))
    assert read_block('models') == table2.models(rows('table2'))
    assert read_block('weights') == validate_weights.table(rows('weights'), rows('weights_speed'))


@pytest.mark.parametrize('name', ['finet_small_se_g4', 'mobilenetv2_035', 'torchvision:shufflenet_v2_x0_5'])
def test_table_2_is_what_is_counted_now(name):
    row = next(row for row in read_rows(RESULTS / 'table2.csv') if row['model'] == name)
    counted = count_row(name, tuple(map(int, row['input'].split('x'))))
    assert counted['conv_linear'] == int(row['madds'])
    assert (counted['params_train'], counted['params_fused']) == (int(row['params_train']), int(row['params_fused']))
