"""Tries train.py's switches for real on `recipe:smoke` in two processes of torchrun on the CPU.

    python -m scripts.bench.try_switches           # some minutes on two idle cores
    python -m scripts.bench.try_switches --table   # docs/training.md's tables from the results files

Writes results/switches.csv: how three epochs ended with each switch. Writes results/processes.csv: one process against
two of half the batch and `--sync-bn`, on 100 images in one batch, without augmentation and dropout, so that both see
the same.
"""
import argparse
import csv
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import timm
import torch

from scripts.report import cpu_name

RESULTS = Path(__file__).parents[1] / 'results'
EPOCHS = 3
SWITCHES = (
    '', '--model-ema', '--grad-accum-steps 2', '--grad-checkpointing', '--channels-last', '--amp --amp-dtype bfloat16',
    '--torchcompile',
    '--model-ema --grad-accum-steps 2 --grad-checkpointing --channels-last --amp --amp-dtype bfloat16')
RUNS = [(1, 20, ''), (2, 10, '--dist-bn reduce'), *((2, 10, f'--sync-bn {switch}'.strip()) for switch in SWITCHES)]
SAME = '--train-split validation --no-aug --drop 0 --lr 0.001'
PAIR = [(1, 100, SAME), (1, 100, f'{SAME} --channels-last'), (2, 50, f'{SAME} --sync-bn')]


def train(processes, batch, switches, folder):
    """The command, its exit status and its summary's rows."""
    args = ['run', 'train', '--config', 'recipe:smoke', '--epochs', str(EPOCHS), '--batch-size', str(batch),
            *shlex.split(switches)]
    if processes > 1:
        args += ['--device-modules', 'timm_finet', 'scripts.several_cpus']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), '-m', 'timm_finet', *args,
         '--output', folder, '--experiment', 'run'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = f'torchrun --standalone --nproc_per_node={processes} -m timm_finet' if processes > 1 else 'timm-finet'
    summary = Path(folder, 'run', 'summary.csv')
    rows = list(csv.DictReader(summary.open(newline=''))) if summary.exists() else []
    if done.returncode:
        print(done.stdout[-3000:])
    return shlex.join([*command.split(), *args]), done.returncode, rows


def environment():
    return dict(torch=torch.__version__, timm=timm.__version__, python=platform.python_version(), threads=1, seed=0,
                processor=cpu_name(), cores=os.cpu_count(), date=date.today())


def write(name, rows):
    with (RESULTS / name).open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def measure():
    switches = []
    for processes, batch, switch in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            command, status, rows = train(processes, batch, switch, folder)
        last = rows[-1] if rows else {}
        switches.append(dict(
            processes=processes, switches=switch or 'none', exit_status=status, epochs=len(rows),
            train_loss=last.get('train_loss', ''), eval_top1=last.get('eval_top1', ''), command=command,
            **environment()))
        print(switches[-1], flush=True)
        write('switches.csv', switches)
    pairs = []
    for processes, batch, switch in PAIR:
        with tempfile.TemporaryDirectory() as folder:
            command, status, rows = train(processes, batch, switch, folder)
        pairs += [dict(
            processes=processes, batch_a_process=batch, layout='channels_last' if 'last' in switch else 'contiguous',
            epoch=int(row['epoch']), train_loss=row['train_loss'], eval_loss=row['eval_loss'],
            eval_top1=row['eval_top1'],
            command=command, **environment()) for row in rows]
    write('processes.csv', pairs)


def table():
    with (RESULTS / 'switches.csv').open(newline='') as file:
        print('| processes | switches | exit status | train loss | top-1 |\n|---|---|---|---|---|')
        for row in csv.DictReader(file):
            switches = row['switches'] if row['switches'] == 'none' else f"`{row['switches']}`"
            loss = f"{float(row['train_loss']):.3f}" if row['train_loss'] else '-'
            print(f"| {row['processes']} | {switches} | {row['exit_status']} | {loss} | {row['eval_top1'] or '-'} |")
    with (RESULTS / 'processes.csv').open(newline='') as file:
        print('\n| train loss in epoch | 0 | 1 | 2 |\n|---|---|---|---|')
        losses = {}
        for row in csv.DictReader(file):
            losses.setdefault((row['processes'], row['layout']), []).append(f"{float(row['train_loss']):.7f}")
        for (processes, layout), found in losses.items():
            print(f"| {processes} process{'es' * (processes > '1')}, {layout} | {' | '.join(found)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', action='store_true', help='print the tables from the results files and stop')
    args = parser.parse_args()
    if not args.table:
        measure()
    table()


if __name__ == '__main__':
    main()
