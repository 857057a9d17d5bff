"""Accuracy against epochs from timm's summary.csv."""
import pytest

from scripts.weights import plot_training

pytest.importorskip('matplotlib')
HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


def test_a_resumed_run_is_one_curve(tmp_path):
    file = tmp_path / 'summary.csv'
    file.write_text(f'{HEADER}0,2,2,10.0,50,0.1\n1,2,2,20.0,50,0.1\n{HEADER}1,2,2,25.0,50,0.1\n2,2,2,30.0,50,0.1\n')
    assert list(plot_training.read(file, 'eval_top1')) == [(0, 1, 2), (10.0, 25.0, 30.0)]
    plot_training.plot([str(file), f'again:{file}'], tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


def test_an_unknown_column_is_named(tmp_path):
    (tmp_path / 'summary.csv').write_text(f'{HEADER}0,2,2,10.0,50,0.1\n')
    with pytest.raises(ValueError, match="no column 'top1'"):
        plot_training.read(tmp_path / 'summary.csv', 'top1')
