"""The command for whoever has a GPU, rehearsed without one: nothing on a card should end in a typing error."""
import os
import subprocess
import sys

import pytest

from scripts.bench import gpu
from scripts.report import ROOT, read_rows

pytest.importorskip('triton', reason='comes with torch for CUDA and ROCm')


def rehearse(file, minutes='60'):
    return subprocess.run(
        [sys.executable, '-m', 'scripts.bench.gpu', '--device', 'cpu', '--tiny', '--file', file, '--minutes', minutes],
        cwd=ROOT, env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)


@pytest.mark.rehearsal
@pytest.mark.skipif('"rehearsal" not in config.getoption("-m")', reason='takes minutes: pytest -m rehearsal')
def test_every_line_is_written_and_a_second_start_finds_nothing_to_do(tmp_path):
    file = tmp_path / 'gpu.csv'
    assert rehearse(file, '0').returncode == 0 and not file.exists()
    done = rehearse(file)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(file)
    assert len({tuple(row[column] for column in gpu.KEY) for row in rows}) == len(rows)
    passes = [row for row in rows if row['kind'] == 'pass']
    assert len(passes) == 2 * 6 and all(row['ms'] and not row['result'] for row in passes), passes
    steps = [row for row in rows if row['kind'] == 'step']
    assert len(steps) == 3 * (2 + 2 + 1) and all(row['ms'] and not row['result'] for row in steps), steps
    assert [row['kind'] for row in rows[:3]] == ['tests', 'tests', 'copy'] and all(row['card'] for row in rows)
    before = file.read_text()
    assert rehearse(file).stdout == '' and file.read_text() == before
