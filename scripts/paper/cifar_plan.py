"""What cifar_tables.py trains: networks with FBN and with BN on CIFAR, in sections, the most important first."""
from typing import Dict, NamedTuple, Tuple

from scripts.runs import Setting
from timm_finet.data.datasets import DATASETS

SEEDS, FIVE, TEN = (0, 1, 2), tuple(range(5)), tuple(range(10))
RATES = (0.1, 0.05)  # tried on plain BN; the rest of `placement` and `evidence` uses the first
SMALL = 'channels=(32,64,120)'  # the widths at G = 8, which every G divides
PARTS = {'cifar10': 'torch/cifar10_first1000', 'cifar100': 'torch/cifar100_first100'}  # for recipe:cifar_long


class Section(NamedTuple):
    """Rows of the table `title`, trained together; a row named `G = 1` is plain BN, with which others are compared."""
    name: str
    title: str
    rows: Dict[str, Setting]
    seeds: Tuple[int, ...] = SEEDS
    dataset: str = 'cifar100'

    @property
    def runs(self):  # seed by seed, so that rows to compare have the same seeds when it is interrupted
        return [(setting, seed) for seed in self.seeds for setting in self.rows.values()]


def dataset_args(dataset, recipe):
    facts = DATASETS[dataset]
    return [
        '--dataset', PARTS[dataset] if recipe == 'cifar_long' else f'torch/{dataset}_pad2',
        '--num-classes', str(len(facts.classes)), '--mean', *(f'{value:.4f}' for value in facts.mean),
        '--std', *(f'{value:.4f}' for value in facts.std)]


def setting(recipe, model, *kwargs, dataset='cifar100', options=(), module='', processes=1):
    modules = ['--device-modules', 'timm_finet', module] if module else []
    return Setting(' '.join([dataset, recipe, model, *kwargs, *options]), (
        '--config', f'recipe:{recipe}', '--model', model, '--model-kwargs', 'small_input=True', *kwargs,
        *dataset_args(dataset, recipe), *modules, '--channels-last', *options), module, processes)


def short(model, *kwargs, options=(), rate=RATES[0], **more):
    return setting('cifar_short', model, *kwargs, options=(*options, '--lr', str(rate)), **more)


def long(model, *kwargs, **more):
    return setting('cifar_long', model, *kwargs, **more)


def finet_small(g):
    return 'finet_small' + (f'_g{g}' if g > 1 else '')


def small(recipe, groups, *kwargs, **more):
    return {f'G = {g}': recipe(finet_small(g), SMALL, *kwargs, **more) for g in groups}


def weights(model, dataset, epochs, batch_size, rate, *options, **more):
    """A section for embedded weights: with label smoothing and random erasing, as nothing is compared."""
    options = (
        '--epochs', str(epochs), '--batch-size', str(batch_size), '--smoothing', '0.1', '--reprob', '0.25', *options)
    rows = {model: short(model, dataset=dataset, options=options, rate=rate, **more)}
    return Section(f'{model}.{dataset}', f'{epochs} epochs', rows, SEEDS[:1], dataset)


ON_GPU = ('--warmup-epochs', '5', '--device', 'cuda')
PROTOCOLS = {
    'placement': [  # where does a block's second ReLU go? 10 epochs
        Section(place, 'finet_small_g4 by act_place, 10 epochs', {
            place: short('finet_small_g4', f'act_place={place}', options=('--epochs', '10'))}, SEEDS[:2])
        for place in ('depthwise', 'pointwise', 'output')],
    'evidence': [  # does FBN beat BN at equal widths? 15 epochs
        Section('rate', 'finet_small, G = 1, by learning rate', {
            f'lr {rate}': short('finet_small', SMALL, rate=rate) for rate in RATES}, SEEDS[:1]),
        Section('small', 'finet_small', small(short, (1, 8, 4, 2))),
        Section('affine', 'finet_small without affine', small(short, (1, 8), 'affine=False')),
        Section('tied', 'finet_small', {
            'G = 8, tied affine': short('finet_small_g8_tied', SMALL, module='scripts.paper.tied_affine')}),
    ],
    'long': [  # and if the network fits its training set? 100 images per class, 50 epochs
        Section('deviation', 'finet_small', small(long, (1,)), FIVE),  # how many seeds the rest needs
        Section('small', 'finet_small', small(long, (1, 8)), TEN),
        Section('groups', 'finet_small', small(long, (2, 4)), FIVE),
        Section('quiet', 'finet_small', {
            'G = 8, gamma from 1/sqrt(G)': long('finet_small_g8_quiet', SMALL, module='scripts.paper.quiet_branches')},
            FIVE),
        Section('tied', 'finet_small', {
            'G = 8, tied affine': long('finet_small_g8_tied', SMALL, module='scripts.paper.tied_affine')}, FIVE),
        Section('affine', 'finet_small without affine', small(long, (1, 8), 'affine=False'), FIVE),
        Section('rate', 'finet_small by learning rate', {
            f'G = {g}, lr {rate}': long(finet_small(g), SMALL, options=('--lr', str(rate)))
            for rate in (0.05, 0.2) for g in (1, 8)}, SEEDS[:1]),
        Section('cifar10', 'finet_small', small(long, (1, 8), dataset='cifar10'), FIVE, 'cifar10'),
        Section('mobilenet', 'mobilenetv2_035 through convert_fbn', {
            f'G = {g}': long('mobilenetv2_035_converted', f'fbn_groups={g}', module='scripts.paper.converted')
            for g in (1, 8)}, FIVE),
    ],
    'paper': [Section('paper', 'finet_large', {  # Table 5's own protocol, 200 epochs of all images
        f'G = {g}': setting('cifar100', model) for g, model in ((1, 'finet_large'), (8, 'finet_large_g8'))})],
    'weights': [  # those that the package embeds
        weights('finet_large_se_g4', 'cifar10', 72, 512, 0.4, '--aa', 'rand-m5-mstd0.5-inc1', *ON_GPU,
                module='timm_finet.cuda_graphs'),
        # two processes take less time than two threads of one process
        weights('finet_large_se_g4', 'cifar100', 30, 64, 0.1, processes=2),
        weights('resnet18_fbn', 'cifar10', 50, 256, 0.2, *ON_GPU, module='timm_finet.cuda_graphs'),
    ],
}
RESULTS_OF = {  # cifar_tables.py writes the first file of a protocol
    'cifar_short': ('placement', 'evidence'), 'cifar_long': ('long',), 'cifar_long_gpu': ('long',),
    'cifar_paper': ('paper',), 'cifar_weights': ('weights',)}
TOGETHER = {'paper': 'cifar_paper', 'long': 'cifar_long_gpu'}  # what cifar_together.py trains on one GPU
