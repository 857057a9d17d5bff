"""Results files and the README's tables, as the scripts beside this one write them."""
import csv
import platform
import re
from pathlib import Path

RESULTS = Path(__file__).parent / 'results'
README = Path(__file__).parents[1] / 'README.md'


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


def readme_block(name):
    """The README's text between the markers of a table."""
    return re.search(rf'<!-- {name} -->\n(.*?)\n<!-- /{name} -->', README.read_text(), re.S)[1]


def write_readme_block(name, text):
    block = f'<!-- {name} -->\n{text}\n<!-- /{name} -->'
    content, found = re.subn(rf'<!-- {name} -->\n.*?<!-- /{name} -->', lambda _: block, README.read_text(), flags=re.S)
    assert found == 1, f'the README has no place marked {name}'
    README.write_text(content)


def cpu_name():
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.machine())
