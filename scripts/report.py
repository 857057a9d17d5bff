"""Results files and the documents' tables, as the scripts beside this one write them."""
import csv
import platform
import re
import shlex
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / 'results'
ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def read_rows(file):
    with open(file, newline='') as lines:
        return list(csv.DictReader(lines))


def write_rows(file, rows):
    part = file.with_suffix('.part')
    with part.open('w', newline='') as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    part.replace(file)


def markdown(head, rows):
    return '\n'.join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ['---'] * len(head), *rows))


def find_block(name):
    """The document that has a place for a table between its markers, and the place."""
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


def command(**private):
    """This process's command line, its private paths by their names: `command(DATA=args.data)`."""
    names = {Path(path): name for name, path in private.items() if path}
    options = [arg.rpartition('=') for arg in sys.orig_argv[1:]]  # --output OUT as well as --output=OUT
    return shlex.join(['python', *(head + equals + names.get(Path(value), value) for head, equals, value in options)])


def cpu_name():
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.machine())
