"""The command for whoever has a GPU, rehearsed without one: nothing on a card should end in a typing error."""
import os
import subprocess
import sys

import pytest

from scripts.bench import gpu
from scripts.report import ROOT, read_rows

pytest.importorskip('triton', reason='comes with torch for CUDA and ROCm')

REHEARSAL = """
import sys
from pathlib import Path
from scripts.bench import gpu
gpu.FILE = Path(sys.argv[1])
gpu.LAYERS, gpu.IMAGES, gpu.ROUNDS, gpu.COPIES, gpu.TIMES = {(24, 32): (1, 64)}, 1, 1, 1, 1
gpu.NETWORKS = [('finet_small', 4, ((32, 8),)), ('mobilenetv3_small_050', 2, ((32, 8),))]
gpu.bench_passes()
gpu.bench_steps()
"""


def rehearse(file):
    environment = {
        **os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT),
        'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run(
        [sys.executable, '-c', REHEARSAL, file], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.rehearsal
@pytest.mark.skipif('"rehearsal" not in config.getoption("-m")', reason='takes minutes: pytest -m rehearsal')
def test_every_line_is_written_and_a_second_start_finds_nothing_to_do(tmp_path):
    file = tmp_path / 'gpu.csv'
    done = rehearse(file)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(file)
    assert len({tuple(row[column] for column in gpu.KEY) for row in rows}) == len(rows)
    passes = [row for row in rows if row['kind'] == 'pass']
    assert len(passes) == 4 and all(row['ms'] and not row['result'] for row in passes), passes
    steps = [row for row in rows if row['kind'] == 'step']
    assert len(steps) == 3 * (2 + 2) and all(row['ms'] and not row['result'] for row in steps), steps
    before = file.read_text()
    assert rehearse(file).stdout == '' and file.read_text() == before
