"""Accuracy against epochs from timm's summary.csv."""
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip('matplotlib')
SCRIPT = Path(__file__).parents[1] / 'scripts' / 'plot_training.py'
HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location('plot_training', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_resumed_run_is_one_curve(script, tmp_path):
    file = tmp_path / 'summary.csv'
    file.write_text(f'{HEADER}0,2,2,10.0,50,0.1\n1,2,2,20.0,50,0.1\n{HEADER}1,2,2,25.0,50,0.1\n2,2,2,30.0,50,0.1\n')
    assert list(script.read(file, 'eval_top1')) == [(0, 1, 2), (10.0, 25.0, 30.0)]
    script.plot([str(file), f'again:{file}'], tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


def test_an_unknown_column_is_named(script, tmp_path):
    (tmp_path / 'summary.csv').write_text(f'{HEADER}0,2,2,10.0,50,0.1\n')
    with pytest.raises(ValueError, match="no column 'top1'"):
        script.read(tmp_path / 'summary.csv', 'top1')
