"""Try train.py's switches on `recipe:smoke` in two processes of torchrun on the CPU.

    OMP_NUM_THREADS=1 python -m scripts.bench.try_switches           # some minutes on two idle cores

This writes results/switches.csv, with the outcome of three epochs with each switch, and results/processes.csv, which
compares one process with two that have half the batch each and `--sync-bn`. The comparison is on 100 images in one
batch, without augmentation and dropout, so that both see the same.
"""
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.report import RESULTS, command_line, facts, markdown, write_rows
from scripts.runs import epochs_of

EPOCHS = 3
SWITCHES = (
    '', '--model-ema', '--grad-accum-steps 2', '--grad-checkpointing', '--channels-last', '--amp --amp-dtype bfloat16',
    '--torchcompile',
    '--model-ema --grad-accum-steps 2 --grad-checkpointing --channels-last --amp --amp-dtype bfloat16')
RUNS = [(1, 20, ''), (2, 10, '--dist-bn reduce'), *((2, 10, f'--sync-bn {switch}'.strip()) for switch in SWITCHES)]
SAME = '--train-split validation --no-aug --drop 0 --lr 0.001'
PAIR = [(1, 100, SAME), (1, 100, f'{SAME} --channels-last'), (2, 50, f'{SAME} --sync-bn')]


def train(processes, batch, switches):
    """Run train.py; return the command, its exit status and the rows of its summary."""
    start = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    line = ['-m', 'timm_finet', 'run', 'train', '--config', 'recipe:smoke', '--epochs', str(EPOCHS),
            '--batch-size', str(batch), *shlex.split(switches)]
    line += ['--device-modules', 'timm_finet', 'scripts.several_cpus'] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        status = subprocess.run(
            [sys.executable, *start, *line, '--output', folder, '--experiment', 'run']).returncode
        return shlex.join(['python', *start, *line]), status, epochs_of(Path(folder, 'run', 'summary.csv'))


def measure_switches():
    for processes, batch, switches in RUNS:
        command, status, rows = train(processes, batch, switches)
        last = rows[-1] if rows else {}
        yield facts() | dict(
            processes=processes, switches=switches or 'none', exit_status=status, epochs=len(rows),
            train_loss=last.get('train_loss', ''), eval_top1=last.get('eval_top1', ''), command=command, threads=1,
            seed=0, cores=os.cpu_count())


def measure_processes():
    for processes, batch, switches in PAIR:
        command, status, rows = train(processes, batch, switches)
        for row in rows:
            yield facts() | dict(
                processes=processes, batch_a_process=batch, layout='channels_last' if 'last' in switches else
                'contiguous', **{column: row[column] for column in ('epoch', 'train_loss', 'eval_loss', 'eval_top1')},
                command=command, threads=1, seed=0, cores=os.cpu_count())


def table_of_switches(rows):
    return markdown(['processes', 'switches', 'exit status', 'train loss', 'top-1'], [
        [row['processes'], row['switches'] if row['switches'] == 'none' else f"`{row['switches']}`",
         row['exit_status'], f"{float(row['train_loss']):.3f}" if row['train_loss'] else '-', row['eval_top1'] or '-']
        for row in rows])


def table_of_processes(rows):
    losses = {}
    for row in rows:
        name = f"{row['processes']} process{'es' * (int(row['processes']) > 1)}, {row['layout']}"
        losses.setdefault(name, [name]).append(f"{float(row['train_loss']):.7f}")
    return markdown(['train loss in epoch', '0', '1', '2'], losses.values())


def main():
    command_line(__doc__).parse_args()
    write_rows(RESULTS / 'switches.csv', list(measure_switches()))
    write_rows(RESULTS / 'processes.csv', list(measure_processes()))


if __name__ == '__main__':
    main()
