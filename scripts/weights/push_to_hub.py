"""Write the cards of the embedded weights, and push them to the Hub: a worked example of timm_finet.hub.

    python -m scripts.weights.push_to_hub        # writes hf_cards/<name>.<tag>/
    python -m scripts.weights.push_to_hub ORG    # also pushes ORG/<name>.<tag>, which requires `hf auth login`

A card's figures come from the network and from results/: weights.csv, weights_speed.csv, and each name's log and
arguments.
"""
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import yaml

from scripts.report import RESULTS, command_line, read_rows
from scripts.weights.validate_weights import NAMES
from timm_finet import hub
from timm_finet.finet import Finet
from timm_finet.hub import card
from timm_finet.hub.checkpoint import Run

CARDS = Path(__file__).parents[2] / 'hf_cards'


def block(model):
    """The file of a picture of a block, and the network that it shows."""
    return ('block.png', 'finet_large_g4') if model.stages[0][0].se is None else ('block_se.png', 'finet_large_se_g4')


def write(name, folder):
    """Write the model repository of embedded weights."""
    model = timm.create_model(name, pretrained=True).eval()
    log = RESULTS / f'{name}.csv'
    last = read_rows(log)[-1]  # all are weights of the last epoch
    run = Run(
        yaml.safe_load((RESULTS / f'{name}.yaml').read_text()), log, int(last['epoch']) + 1, float(last['eval_top1']))
    results = card.read_results(RESULTS / 'weights.csv', name)
    speed = [row for row in read_rows(RESULTS / 'weights_speed.csv') if row['model'] == name]
    figure = ''
    if isinstance(model, Finet):
        file, shown = block(model)
        shutil.copy(RESULTS / file, folder)
        figure = (
            f'![A block in train and in fused form]({file})\n\n'
            f'The figure shows {shown}; others of the family differ in width and in G.')
    hub.save(model, folder, card.make_card(model, name, name, run, results, speed, figure), run.args, log)


def main():
    parser = command_line(__doc__)
    parser.add_argument('org', nargs='?', help='user or organisation on the Hub')
    org = parser.parse_args().org
    for name in NAMES:
        with TemporaryDirectory() as folder:
            write(name, folder)
            (CARDS / name).mkdir(parents=True, exist_ok=True)
            for file in Path(folder).iterdir():
                if file.name in ('README.md', 'config.json') or file.suffix == '.png':
                    shutil.copy(file, CARDS / name)
            print(f'wrote hf_cards/{name}')
            if org:
                print(hub.push(folder, f'{org}/{name}'))


if __name__ == '__main__':
    main()
