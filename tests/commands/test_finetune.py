"""`timm-finet finetune` on folders of the shipped images."""
import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset

from timm_finet.commands import finetune
from timm_finet.data.datasets import CIFAR10
from timm_finet.images import contact_sheet, shipped_images

WEIGHTS = 'finet_small_g4.cifar10'

# Takes its arguments as timm's does. Its best checkpoint is what it starts from, weights that know CIFAR-10's classes;
# its last one is spoiled.
STAND_IN = """
import argparse, timm, torch, yaml
from pathlib import Path
from timm.utils import ParseKwargs
config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('--config')
parser = argparse.ArgumentParser()
parser.add_argument('--device', default='cuda')
parser.add_argument('--pretrained', action='store_true')
for name in ('num-classes', 'img-size', 'epochs', 'batch-size', 'workers'):
    parser.add_argument(f'--{name}', type=int)
for name in ('data-dir', 'dataset', 'model', 'output', 'experiment', 'resume', 'pretrained-path'):
    parser.add_argument(f'--{name}', default='')
for name, kind in (('input-size', int), ('mean', float), ('std', float)):
    parser.add_argument(f'--{name}', type=kind, nargs=3)
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)

def main():
    known, rest = config_parser.parse_known_args()
    parser.set_defaults(**yaml.safe_load(Path(known.config).read_text()))
    args = parser.parse_args(rest)
    overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=args.num_classes,
        **overlay if args.pretrained_path else {}, **args.model_kwargs)
    folder = Path(args.output, args.experiment)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'args.yaml').write_text('')
    assert args.epochs, 'no epochs'
    for name in ('model_best', 'last'):
        torch.save(dict(state_dict=model.state_dict(), args=args), folder / f'{name}.pth.tar')
        torch.nn.init.zeros_(model.get_classifier().weight)

if __name__ == '__main__':
    main()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch, scripts_run_here):
    try:
        (tmp_path / 'link').symlink_to('scripts')
    except OSError:
        pytest.skip('This system refuses symbolic links: on Windows, turn on its Developer Mode')
    (tmp_path / 'link').unlink()
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'train.py').write_text(STAND_IN)
    monkeypatch.setenv('TIMM_SCRIPTS', str(tmp_path / 'scripts'))
    monkeypatch.chdir(tmp_path)


def write_classes(folder, count, classes=CIFAR10.classes, first=0):
    """Folders of `count` images a class."""
    images, _ = shipped_images()
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(first, first + count):
            images[40 * CIFAR10.classes.index(name) + i].save(folder / name / f'{i}.png')
    return folder


@torch.inference_mode()
def judge(folder):
    """Counts by class and guess of images in class folders, and the mistakes with their titles, the surest first."""
    model = timm.create_model(WEIGHTS, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    counts, mistakes = [[0] * 10 for _ in range(10)], []
    for label, name in enumerate(CIFAR10.classes):
        for file in sorted((folder / name).iterdir()):
            image = Image.open(file)
            sure, guess = (value.item() for value in model(transform(image)[None]).softmax(1)[0].max(0))
            counts[label][guess] += 1
            if guess != label:
                mistakes.append((sure, image, f'{CIFAR10.classes[guess]} {sure:.0%}\nnot {name}'))
    return counts, [mistake[1:] for mistake in sorted(mistakes, key=lambda mistake: -mistake[0])]


def test_confusion_has_a_row_a_class_and_a_column_a_guess_blue_where_right(tmp_path):
    counts, names = [[3, 1, 0], [0, 0, 2], [0, 0, 0]], ['ant', 'bee', 'a name that is longer than others']
    finetune.draw_confusion(counts, names, str(tmp_path / 'sheet.png'))
    finetune.draw_confusion([[2 * n for n in row] for row in counts], names, str(tmp_path / 'doubled.png'))
    assert (tmp_path / 'sheet.png').read_bytes() != (tmp_path / 'doubled.png').read_bytes()  # the numbers
    with Image.open(tmp_path / 'sheet.png') as sheet:
        margin = sheet.width - 3 * 32 - 8
        cells = [[sheet.getpixel((margin + j * 32 + 3, 8 + i * 32 + 3)) for j in range(3)] for i in range(3)]
        assert margin > 100 and sheet.height == sheet.width
        ink = sheet.convert('L').point(lambda level: 255 * (level < 80))
    rows = [ink.crop((0, 8 + i * 32, margin, 40 + i * 32)).getbbox() for i in range(3)]
    columns = [ink.crop((margin + i * 32, 104, margin + 32 + i * 32, 104 + margin)).getbbox() for i in range(3)]
    assert rows[2][0] < 20 < 80 < min(rows[0][0], rows[1][0])  # the long name is the last one, and all end at the cells
    assert columns[2][3] > margin - 20 and max(columns[0][3], columns[1][3]) < margin - 80
    numbers = [[ink.crop((margin + j * 32, 8 + i * 32, margin + j * 32 + 32, 40 + i * 32)) for j in range(3)]
               for i in range(3)]
    assert [[number.getbbox() is not None for number in row] for row in numbers] == [
        [count > 0 for count in row] for row in counts]
    white = (255, 255, 255)
    pale = [round(255 - 155 * share) for share in (3 / 4, 1 / 4, 1)]  # of the class's images
    assert cells == [
        [(pale[0], pale[0], 255), (255, pale[1], pale[1]), white], [white, white, (255, pale[2], pale[2])], [white] * 3]


def test_confusion_of_many_classes_has_cells_that_can_be_seen(tmp_path):
    counts = [[0] * 410 for _ in range(410)]
    finetune.draw_confusion(counts, ['name'] * 410, str(tmp_path / 'sheet.png'))
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.width > 6 * 410


def test_of_many_mistakes_sixty_are_drawn(stand_in, cli, tmp_path):
    script = tmp_path / 'scripts' / 'train.py'
    spoil = 'torch.nn.init.zeros_(model.get_classifier().weight)\n    folder = Path('
    script.write_text(STAND_IN.replace('folder = Path(', spoil))
    write_classes(tmp_path / 'mine' / 'train', 1, CIFAR10.classes[:3])
    write_classes(tmp_path / 'mine' / 'valid', 40, CIFAR10.classes[:3], first=0)
    status, out, err = cli(
        'finetune', 'mine', '--weights', WEIGHTS, '--output', 'out', '--epochs', 1, '--workers', 0)
    assert status == 0, err
    assert '33.33% of 120 validation images right' in out  # all are taken for one class
    with Image.open('out/mistakes.png') as sheet:
        assert sheet.size == (11 * 112, 6 * (112 + 28))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


@pytest.mark.scripts
def test_train_py_trains_and_its_best_accuracy_is_reported(tmp_path):
    classes = CIFAR10.classes[:3]
    write_classes(tmp_path / 'mine' / 'train', 8, classes)
    write_classes(tmp_path / 'mine' / 'val', 4, classes, first=8)
    command = ['finetune', 'mine', '--weights', WEIGHTS, '--epochs', '1', '--workers', '0']
    result = subprocess.run(
        [sys.executable, '-m', 'timm_finet', *command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    best = re.search(r'Best metric: ([\d.]+) ', result.stderr)[1]
    assert f'{float(best):.2f}% of 12 validation images right' in result.stdout
    assert '3 classes, 24 images to train on and 12 to validate on\n' in result.stdout
    assert {'model_best.pth.tar', 'summary.csv', 'confusion.png'} <= set(files(tmp_path / 'output/finetune/mine'))


def test_class_folders_are_split_judged_and_drawn_and_the_next_commands_work(stand_in, cli, tmp_path):
    write_classes(tmp_path / 'my images', 20, first=20)
    before = files(tmp_path / 'my images')
    status, out, err = cli(
        'finetune', 'my images', '--weights', WEIGHTS, '--output', 'out', '--epochs', 1, '--workers', 0)
    assert status == 0, err
    held = {path.parent.name: len(list(path.parent.iterdir())) for path in Path('out/images/validation').glob('*/*')}
    assert held == dict.fromkeys(CIFAR10.classes, 4)
    assert len(list(Path('out/images/train').glob('*/*'))) == 160
    assert all(path.is_symlink() and path.is_file() for path in Path('out/images').glob('*/*/*'))
    assert files(tmp_path / 'my images') == before

    top1 = float(re.search(r'model_best.pth.tar: ([\d.]+)% of 40 validation images right', out)[1])
    assert 80 <= top1 < 100  # these weights' top-1 is 90%
    counts, mistakes = judge(Path('out/images/validation'))
    assert top1 == pytest.approx(100 * sum(counts[i][i] for i in range(10)) / 40) and len(mistakes) > 1
    images, titles = zip(*mistakes)
    contact_sheet(images, titles, [False] * len(titles), 'mistakes.png', size=112)
    finetune.draw_confusion(counts, CIFAR10.classes, 'confusion.png')
    for name in ('mistakes.png', 'confusion.png'):
        with Image.open(name) as expected, Image.open(f'out/{name}') as drawn:
            assert expected.size == drawn.size and expected.tobytes() == drawn.tobytes()

    export, push = (shlex.split(line)[1:] for line in out.splitlines() if line.startswith('timm-finet '))
    assert 'right: ' in cli(*export)[1]  # of the shipped images: the classes are in the checkpoint
    assert Path('out/finet_small_g4.onnx').stat().st_size > 1 << 20
    card = cli(*push)[1]
    assert '# finet_small_g4\n' in card and 'Would push to ORG/NAME:' in card


def test_any_weights_may_be_fine_tuned_and_again(stand_in, cli, tmp_path):
    write_classes(tmp_path / 'mine', 5, CIFAR10.classes[:3])
    network = timm.create_model('test_resnet', num_classes=5)
    timm.models.save_for_hf(network, 'folder', safe_serialization=True)
    status, out, err = cli(
        'finetune', 'mine', '--weights', 'local-dir:folder', '--output', 'first', '--epochs', 1, '--workers', 0)
    assert status == 0, err
    assert 'timm-finet push' not in out  # the Hub's card is for networks of ours
    export, = (shlex.split(line)[1:] for line in out.splitlines() if line.startswith('timm-finet '))
    assert '--checkpoint' in export and 'test_resnet' in export

    small = timm.create_model('finet_small_g2', num_classes=4, small_input=True, channels=(16, 16, 24))
    args = argparse.Namespace(
        model='finet_small_g2', num_classes=4, input_size=[3, 32, 32], mean=[0.5, 0.4, 0.3],
        model_kwargs=dict(small_input=True, channels=(16, 16, 24)))
    torch.save(dict(state_dict=small.state_dict(), args=args), 'mine.pth.tar')
    status, out, err = cli(
        'finetune', 'mine', '--weights', 'mine.pth.tar', '--output', 'second', '--epochs', 1, '--workers', 0,
        '--std', '0.3', '0.2', '0.1')
    assert status == 0, err
    saved = torch.load('second/model_best.pth.tar', weights_only=False)
    assert saved['args'].mean == [0.5, 0.4, 0.3] and saved['args'].input_size == [3, 32, 32]
    assert saved['args'].std == [0.3, 0.2, 0.1]  # what is given goes before what the weights were trained with
    torch.testing.assert_close(saved['state_dict']['stem.conv.weight'], small.state_dict()['stem.conv.weight'])
    assert len(saved['state_dict']['classifier.bias']) == 3


def test_training_that_ends_early_leaves_nothing(stand_in, cli, tmp_path):
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    with pytest.raises(AssertionError, match='no epochs'):  # of the script
        cli('finetune', 'mine', '--weights', WEIGHTS, '--output', 'out', '--epochs', 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['mine', 'scripts']


@pytest.mark.parametrize('options, message', [
    (['--epoch', '5'], 'unrecognized arguments: --epoch 5: did you mean --epochs?'),
    (['--workers', 'two'], "argument --workers: invalid int value: 'two'")])
def test_misspelt_option_gets_one_line_and_leaves_nothing(options, message, stand_in, refused, tmp_path):
    (tmp_path / 'scripts' / 'train.py').write_text(
        STAND_IN.replace('argparse.ArgumentParser()', 'argparse.ArgumentParser(allow_abbrev=False)'))
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    refused(['finetune', 'mine', '--output', 'out', *options], f'^timm-finet finetune: {re.escape(message)}$')
    assert not Path('out').exists()


def write_sideways(folder):
    """Class folders whose images lie on their side, and whose EXIF data say so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in write_classes(folder, 4, CIFAR10.classes[:2]).rglob('*.png'):
        with Image.open(file) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)


def test_photographs_are_trained_on_and_judged_upright(stand_in, tmp_path, monkeypatch):
    write_sideways(tmp_path / 'mine')
    command, _, _ = finetune.prepare('mine', WEIGHTS, 'out', [])
    options = dict(zip(command[1::2], command[2::2]))
    images, _ = shipped_images()
    upright = {images[40 * label + i].tobytes() for label in range(2) for i in range(4)}
    for split in ('train', 'validation'):
        dataset = create_dataset(options['--dataset'], options['--data-dir'], split)
        assert len(dataset) == {'train': 6, 'validation': 2}[split]
        seen = {(image.tobytes(), label) for image, label in dataset}
        assert {data for data, _ in seen} <= upright and len(seen) == len(dataset)
        assert {label for _, label in seen} == {0, 1}
    spy = Mock(wraps=create_dataset)
    monkeypatch.setattr(finetune, 'create_dataset', spy)
    finetune.train(command + ['--epochs', '1', '--workers', '0'], WEIGHTS, Path('out'))
    assert [call.args[0] for call in spy.mock_calls] == [options['--dataset']]


def test_split_is_of_each_class_and_always_alike():
    classes = {name: [Path(name, str(i)) for i in range(count)] for name, count in (('a', 2), ('b', 9), ('c', 50))}
    training, held = finetune.hold_out(classes)
    assert {name: len(images) for name, images in held.items()} == {'a': 1, 'b': 1, 'c': 10}
    assert all(sorted(training[name] + held[name]) == sorted(classes[name]) for name in classes)
    assert (training, held) == finetune.hold_out(classes)


def test_images_held_out_are_drawn_from_the_whole_class():
    """What lies side by side in a folder is often alike."""
    images = [Path('a', f'{i:03}') for i in range(100)]
    held = finetune.hold_out({'a': images})[1]['a']
    assert all(any(file in held for file in images[i:i + 50]) for i in range(0, 100, 50))


@pytest.mark.parametrize('name', ['validation', 'val', 'valid'])
def test_images_apart_are_validated_on_and_hidden_folders_are_none(name, stand_in, tmp_path):
    write_classes(tmp_path / 'mine' / 'train', 2, CIFAR10.classes[:2])
    write_classes(tmp_path / 'mine' / name, 1, CIFAR10.classes[:2], first=9)
    (tmp_path / 'mine' / 'train' / '.thumbnails').mkdir()
    training, validation = finetune.find_images(tmp_path / 'mine')
    assert list(training) == list(validation) == list(CIFAR10.classes[:2])
    assert {file.name for images in validation.values() for file in images} == {'9.png'}


@pytest.mark.parametrize('option', ['--class-map', '--data-dir', '--dataset', '--experiment', '--model'])
@pytest.mark.parametrize('join', [lambda option: [f'{option}=x'], lambda option: [option, 'x']], ids=['=', 'apart'])
def test_options_that_finetune_sets_are_refused(option, join, stand_in, refused, tmp_path):
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    refused(['finetune', 'mine', '--output', 'out', *join(option)], f'^timm-finet finetune: {option} cannot be used')
    assert not Path('out').exists()


def no_images(folder):
    (folder / 'cat').mkdir()


def one_image(folder):
    write_classes(folder, 1, ['cat'])


def outside(folder):
    shipped_images()[0][0].save(folder / 'x.png')


def unreadable(folder):
    write_classes(folder, 2, ['cat'])
    (folder / 'cat' / 'bad.jpg').write_text('no image')


def other_classes(folder):
    write_classes(folder / 'train', 2, ['ship', 'frog'])
    write_classes(folder / 'validation', 2, ['ship', 'deer'])


def full(folder):
    (folder.parent / 'out').mkdir()
    (folder.parent / 'out' / 'x').write_text('')


BAD = dict(
    missing=(None, ['none'], r"FOLDER='.*none' does not exist: give a folder with"),
    no_folders=(None, ['empty'], r"FOLDER='.*empty' has 0 class folders: give a folder with two or more"),
    no_images=(no_images, ['mine'], "FOLDER='.*mine' has no images in 'cat': add some"),
    one_image=(one_image, ['mine'], "FOLDER='.*mine' has only one image in 'cat': give two"),
    outside=(outside, ['mine'], "FOLDER='.*mine' has .*x.png outside of a class folder: move it to FOLDER/CLASS"),
    unreadable=(unreadable, ['mine'], "FOLDER='.*mine': .*bad.jpg is not an image .* Repair or remove it"),
    other_classes=(other_classes, ['mine'], "FOLDER='.*mine' has 'deer' in only one of train and validation"),
    weights=(None, ['mine', '--weights', 'finet_large'], "--weights='finet_large' is unknown: use finet_large_se_g4"),
    model=(None, ['mine', '--model=finet_large'], '--model cannot be used with finetune: .* --weights'),
    in_chans=(None, ['mine', '--in-chans', '1'], '--in-chans cannot be used with finetune: all images are'),
    full=(full, ['mine'], "--output='out' is not empty: name another folder, or continue .* --resume out/last.pth.tar"),
    recipe=(None, ['mine', '--config', 'recipe:none'], "'recipe:none' is unknown: use one of"),
)


@pytest.mark.parametrize('case', BAD)
def test_wrong_arguments_are_named_in_one_line_and_nothing_is_written(case, stand_in, refused, tmp_path):
    spoil, args, message = BAD[case]
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    (tmp_path / 'empty').mkdir()
    if spoil:
        spoil(tmp_path / 'mine')
    before = files(tmp_path)
    refused(['finetune', *args, '--output', 'out'], f'^timm-finet finetune: .*{message}')
    assert files(tmp_path) == before and (case == 'full' or not Path('out').exists())


def test_hint_to_go_on_can_be_pasted(stand_in, refused, tmp_path):
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    (tmp_path / 'my runs').mkdir()
    (tmp_path / 'my runs' / 'last.pth.tar').touch()
    refused(['finetune', 'mine', '--output', 'my runs'], "or continue with --resume 'my runs/last.pth.tar'.$")


@pytest.mark.skipif(torch.cuda.is_available(), reason='torch finds a GPU: run it where there is none')
def test_gpu_that_is_not_there_is_named_in_one_line(stand_in, refused, tmp_path):
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    refused(['finetune', 'mine', '--device', 'cuda', '--output', 'out'],
            "^timm-finet finetune: --device='cuda' cannot be used because torch finds no such GPU here: "
            "use --device cpu.$")
    assert not Path('out').exists()


def test_output_without_links_is_left_as_it_was(stand_in, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(1, 'Operation not permitted')
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    monkeypatch.setattr(Path, 'symlink_to', refuse)
    with pytest.raises(OSError, match=r"--output='out' cannot hold links to the images \(Operation not permitted\)"):
        finetune.prepare('mine', None, 'out', [])
    assert not Path('out').exists()


def test_resumed_run_keeps_its_split(stand_in, tmp_path):
    write_classes(tmp_path / 'mine', 10, CIFAR10.classes[:2])
    finetune.prepare('mine', None, 'out', [])
    before = files(tmp_path / 'out')
    Path('out/last.pth.tar').write_text('')
    images, _ = shipped_images()
    images[39].save(tmp_path / 'mine' / CIFAR10.classes[0] / '39.png')
    finetune.prepare('mine', None, 'out', ['--resume', 'out/last.pth.tar'])
    assert files(tmp_path / 'out') == [*before, 'last.pth.tar']


def test_class_named_train_is_a_class(stand_in, tmp_path):
    write_classes(tmp_path / 'mine', 2, CIFAR10.classes[:2])
    (tmp_path / 'mine' / CIFAR10.classes[0]).rename(tmp_path / 'mine' / 'train')
    training, validation = finetune.find_images(tmp_path / 'mine')
    assert (sorted(training), validation) == ([CIFAR10.classes[1], 'train'], None)


def test_images_fewer_than_a_batch_make_one(stand_in, tmp_path):
    """train.py drops a smaller batch, and with it the epoch."""
    write_classes(tmp_path / 'mine', 5, CIFAR10.classes[:2])
    command, weights, output = finetune.prepare('mine', None, None, ['--epochs', '3'])
    assert command[command.index('--batch-size') + 1] == '8' and command[-2:] == ['--experiment', 'mine']
    assert (weights, output) == ('finet_large_se_g4.tiny_in200', Path('output/finetune/mine'))
