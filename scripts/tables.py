"""Write the documents' tables and pictures from the results files.

    python -m scripts.tables

A table's place is between `<!-- NAME -->` and `<!-- /NAME -->`. The scripts that measure write results files only.
"""
from functools import partial

from scripts.bench import bench_training, fuse_networks, gpu, kernels, save_memory, try_switches
from scripts.paper import cifar_tables, draw_block, table2, table4, table4_operators
from scripts.report import RESULTS, command_line, read_rows, write_block
from scripts.weights import int8, own_classes, plot_training, train_photos, transfer, validate_weights

TABLES = {  # by place: the function that makes it, and its results files
    'bench_training': (bench_training.table, 'bench_training'),
    'bench_training_gpu': (partial(bench_training.table, kind='GPU'), 'bench_training'),
    'headline': (bench_training.headline, 'bench_training'),
    'save_memory': (save_memory.table, 'save_memory'),
    'gpu_steps': (gpu.table_of_steps, 'gpu'),
    'gpu_passes': (gpu.table_of_passes, 'gpu'),
    'kernels_launches': (kernels.table_of_launches, 'kernels_launches'),
    'kernels_bytes': (kernels.table_of_bytes, 'kernels_bytes'),
    'kernels_resources': (kernels.table_of_resources, 'kernels_resources'),
    'kernels_errors': (kernels.table_of_errors, 'kernels_errors'),
    'switches': (try_switches.table_of_switches, 'switches'),
    'processes': (try_switches.table_of_processes, 'processes'),
    'fuse_networks': (fuse_networks.table, 'fuse_networks'),
    'table2': (table2.table, 'table2'),
    'models': (table2.models, 'table2'),
    'table4': (table4.table, 'table4'),
    'table4_operators': (table4_operators.table, 'table4_operators'),
    **{stem: (partial(cifar_tables.table, stem=stem), stem) for stem in cifar_tables.RESULTS_OF},
    'weights': (validate_weights.table, 'weights', 'weights_speed'),
    'int8': (int8.table, 'int8'),
    'int8_groups': (int8.table_of_groups, 'int8_groups'),
    'transfer': (transfer.table, 'transfer'),
    'own_classes': (own_classes.table, 'own_classes'),
}


def make(name):
    """Make the text of a place."""
    function, *files = TABLES[name]
    return function(*(read_rows(RESULTS / f'{file}.csv') for file in files))


def plot():
    for script, name in ((table2, 'table2'), (table4, 'table4'), (bench_training, 'bench_training')):
        script.plot(read_rows(RESULTS / f'{name}.csv'))
    cifar_tables.plot_groups(RESULTS / 'cifar_short.csv')
    for stem in ('cifar_short', 'cifar_long', 'cifar_paper'):
        cifar_tables.plot_epochs(RESULTS / f'{stem}.csv')
    train_photos.plot(train_photos.CSV)
    curves = [f'{name}:{RESULTS}/{name}.csv' for name in validate_weights.NAMES]
    plot_training.plot(curves, RESULTS / 'cifar_weights.png')
    draw_block.draw()


def main():
    command_line(__doc__).parse_args()
    for name in TABLES:
        write_block(name, make(name))
    plot()


if __name__ == '__main__':
    main()
