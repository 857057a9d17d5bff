"""Results files, facts about the machine, and the tables in the documents, for the other scripts."""
import argparse
import csv
import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent / 'results'
ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def read_rows(file):
    with open(file, newline='') as lines:
        return list(csv.DictReader(lines))


def rows_so_far(file):
    """The rows of a results file, or none if the file does not exist yet."""
    return read_rows(file) if file.exists() else []


def write_rows(file, rows):
    part = file.with_suffix('.part')
    with part.open('w', newline='') as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    part.replace(file)


def merge_rows(file, rows, key):
    """Replace the rows of a file that are equal in all columns of `key`, and append the other rows."""
    merged = {tuple(str(row[column]) for column in key): row for row in [*rows_so_far(file), *rows]}
    write_rows(file, list(merged.values()))


def command_line(description):
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def command(**private):
    """This process's command line, with private paths replaced by names: `command(DATA=args.data)`."""
    names = {Path(path): name for name, path in private.items() if path}
    options = [arg.rpartition('=') for arg in sys.orig_argv[1:]]  # --output OUT as well as --output=OUT
    return shlex.join(['python', *(head + equals + names.get(Path(value), value) for head, equals, value in options)])


def device_name(device='cpu'):
    if device == 'cuda':
        import torch
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.machine())


def facts(device='cpu', **private):
    """The last columns of a results file: device, versions, date and command."""
    import timm
    import torch  # not at the top: reading and writing results needs neither
    return dict(
        device=device_name(device), torch=torch.__version__, timm=timm.__version__, date=date.today(),
        command=command(**private))


def markdown(head, rows):
    return '\n'.join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ['---'] * len(head), *rows))


def pm(values):
    """Mean ± standard deviation of a sample as text, without a deviation if there is only one value."""
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def find_block(name):
    """Find the document with the markers of a table, and the place between them."""
    for document in DOCUMENTS:
        place = re.search(rf'(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)', document.read_text(), re.S)
        if place:
            return document, place
    raise LookupError(f'no document has a place marked {name}')


def read_block(name):
    return find_block(name)[1][0]


def write_block(name, text):
    document, place = find_block(name)
    content = document.read_text()
    document.write_text(content[:place.start()] + text + content[place.end():])
