"""Accuracy against epochs from timm's summary.csv."""
import matplotlib.figure
import pytest

from scripts.weights import plot_training

HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


def test_a_resumed_run_is_one_curve(tmp_path, monkeypatch):
    file = tmp_path / 'summary.csv'
    file.write_text(f'{HEADER}0,2,2,10.0,50,0.1\n1,2,2,20.0,50,0.1\n{HEADER}1,2,2,25.0,50,0.1\n2,2,2,30.0,50,0.1\n')
    shown = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda self, *_, **__: shown.extend(self.axes[0].lines))
    plot_training.plot([f'G=1:{file}'], tmp_path / 'plot.png')
    (line,) = shown
    assert (line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) == ('G=1 (30.00)', [1, 2, 3], [10, 25, 30])


def test_another_file_is_named(tmp_path):
    (tmp_path / 'summary.csv').write_text('epoch,loss\n0,2\n')
    with pytest.raises(ValueError, match="summary.csv has no column 'eval_top1'"):
        plot_training.plot([str(tmp_path / 'summary.csv')], tmp_path / 'plot.png')
