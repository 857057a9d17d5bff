"""Each example runs as a script, learns, and gives the same outputs once fused."""
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / 'examples'


def run(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name='__main__')
    return capsys.readouterr().out


def test_own_network_with_fbn_learns_and_fuses(capsys):
    out = run('fbn_in_your_network.py', capsys)
    losses = [float(loss) for loss in re.findall(r'loss ([\d.]+)', out)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    assert 'is now Conv2d(' in out
    assert float(re.search(r'largest difference of the outputs: (\S+)', out)[1]) < 1e-4


@pytest.mark.slow
def test_backbone_learns_segmentation_and_fuses(capsys):
    out = run('segmentation.py', capsys)
    before, after, fused = (
        float(re.search(rf'{form} ([\d.]+)', out)[1]) for form in ('before: mean IoU', 'after: mean IoU', 'fused'))
    assert before < 0.4 and after > 0.7  # everything taken for background: 0.28
    assert abs(fused - after) <= 0.01


def test_every_example_is_run():
    tests = Path(__file__).read_text()
    assert all(f"run('{file.name}'" in tests for file in EXAMPLES.glob('*.py'))
