"""The notebooks run from the first cell to the last, and are kept without outputs."""
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'examples').glob('*.ipynb'))


@pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_kept_without_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_fine_tuned_network_is_exported_as_it_answers(tmp_path):
    notebook = nbformat.read(next(file for file in NOTEBOOKS if file.stem == 'finetune'), as_version=4)
    settings = next(cell for cell in notebook.cells if cell.id == 'settings')
    settings.source, changed = re.subn('^epochs = .*', 'epochs = 2', settings.source, flags=re.M)
    assert changed == 1
    NotebookClient(notebook, kernel_name='python3', resources={'metadata': {'path': tmp_path}}).execute()
    text = ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', ()))
    assert '180 images to train on, 60 to validate on: bird, cat, deer, dog, frog, horse\n' in text
    assert float(re.findall(r'([\d.]+)% of the validation images right', text)[-1]) > 50  # by chance: 17%
    assert float(re.search(r'largest difference of the probabilities: (\S+)', text)[1]) < 1e-4
    assert '100% of the answers are as in PyTorch' in text
    with Image.open(tmp_path / 'confusion.png') as sheet:
        assert sheet.width == sheet.height > 6 * 32
