"""`timm-finet run`: timm's scripts with our models."""
import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch

from timm_finet.commands import arguments
from timm_finet.commands import run as launch
from timm_finet.images import shipped_images

SCRIPT = '''
import sys, timm
from timm.data import create_dataset
assert __name__ == '__main__'
print(sys.argv[1:], timm.is_model('finet_large_se_g4'), timm.is_model('resnet50_fbn'))
sys.exit(0 if '--ok' in sys.argv else 7)
'''


@pytest.fixture
def script(tmp_path, monkeypatch, scripts_run_here):
    (tmp_path / 'validate.py').write_text(SCRIPT)
    monkeypatch.setenv('TIMM_SCRIPTS', str(tmp_path))
    return tmp_path / 'validate.py'


@pytest.mark.parametrize('by', ['name', 'path'])
def test_script_runs_as_main_with_our_models_and_its_exit_status(by, script, cli):
    name = 'validate' if by == 'name' else script
    assert cli('run', name, '--model', 'x', '--help') == (7, "['--model', 'x', '--help'] True True\n", '')


def test_scripts_may_fuse_before_eval(script, cli):
    script.write_text(
        "import timm, torch\n"
        "from timm.utils import reparameterize_model\n"
        "model = timm.create_model('finet_small_se_g2', num_classes=5)\n"
        "fused = reparameterize_model(model)\n"
        "x = torch.randn(2, 3, 64, 64)\n"
        "print(fused.training, any('running_var' in key for key in fused.state_dict()))\n"
        "torch.testing.assert_close(fused.eval()(x), model.eval()(x))\n")
    assert cli('run', 'validate')[1].split() == ['True', 'False']


@pytest.mark.slow
def test_torchrun_starts_it(script):
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_finet', 'run',
         'validate', '--ok'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("['--ok']") == 2 and result.stdout.count('True True') == 2


def test_recipes_are_found_by_name(script):
    command = launch.resolve('validate', ['--config', 'recipe:cifar10_short', '--lr', '1'])
    assert command[0] == str(script) and Path(command[2]).name == 'cifar10_short.yaml'
    assert command[3:] == ['--lr', '1']
    with pytest.raises(FileNotFoundError, match="recipe:none.*cifar10_short"):
        launch.resolve('validate', ['--config', 'recipe:none'])


def test_unknown_scripts_are_named(script):
    with pytest.raises(FileNotFoundError, match="'trane' is unknown: use one of train"):
        launch.find_script('trane')
    with pytest.raises(FileNotFoundError, match='such.py'):
        launch.find_script('no/such.py')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    return tmp_path / 'timm_scripts' / f'v{timm.__version__}'


def test_script_is_fetched_once_at_the_installed_versions_tag(cache, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = self.path.endswith('/train.py')
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(b'print(1)' if found else b'')

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(launch, 'URL', f'http://127.0.0.1:{server.server_port}/timm')
        for _ in range(2):
            assert launch.find_script('train').read_text() == 'print(1)'
        with pytest.raises(FileNotFoundError, match='404.*Give the path'):
            launch.find_script('validate')
        server.shutdown()
    assert asked == [f'/timm/v{timm.__version__}/train.py', f'/timm/v{timm.__version__}/validate.py']
    assert [p.name for p in cache.iterdir()] == ['train.py']


def test_no_network_names_three_ways_out(cache, monkeypatch):
    monkeypatch.setattr(launch, 'URL', 'http://127.0.0.1:1')
    message = f'TIMM_SCRIPTS to a checkout of timm at tag v{timm.__version__}.*train.py'
    with pytest.raises(FileNotFoundError, match=message):
        launch.find_script('train')
    assert not cache.exists()


TRAIN = """
import argparse, json, yaml
config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config')
parser = argparse.ArgumentParser()
parser.add_argument('data', nargs='?')
parser.add_argument('--device', default='cuda')
parser.add_argument('--pretrained', action='store_true')
for name in ('num-classes', 'img-size', 'input-size'):
    parser.add_argument(f'--{name}', type=int)
for name in (
        'data-dir', 'dataset', 'model', 'output', 'resume', 'initial-checkpoint', 'pretrained-path', 'train-split'):
    defaults = {'dataset': 'hfids/x', 'model': 'finet_small', 'train-split': 'train'}
    parser.add_argument(f'--{name}', default=defaults.get(name))
parser.add_argument('--dataset-download', action='store_true')
parser.add_argument('--device-modules', nargs='+')

def main():
    known, rest = config_parser.parse_known_args()
    if known.config:
        parser.set_defaults(**yaml.safe_load(open(known.config)))
    print(json.dumps(vars(parser.parse_args(rest))))

if __name__ == '__main__':
    main()
"""


@pytest.fixture
def train(script, cli, monkeypatch):
    """`timm-finet run train` with a script that reads its arguments as timm's does, and prints them."""
    (script.parent / 'train.py').write_text(TRAIN)
    monkeypatch.chdir(script.parent)
    return lambda *args: cli('run', 'train', *args)


@pytest.fixture
def classes(script):
    for name in 'abcd':
        (script.parent / 'data' / 'train' / name).mkdir(parents=True)
        shipped_images()[0][0].save(script.parent / 'data' / 'train' / name / '0.png')


def test_a_script_that_runs_as_it_is_imported_runs_once_and_unchecked(train, tmp_path):
    (tmp_path / 'train.py').write_text('import sys\nparser = None\nprint(sys.argv[1:])')
    assert train('--model', 'none') == (0, "['--model', 'none']\n", '')


@pytest.mark.parametrize('by', ['option', 'config'])
def test_output_that_cannot_be_written_is_refused_before_training(by, train, refused, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'recipe.yaml').write_text(f'output: {tmp_path / "file" / "runs"}\n')
    refused(
        ['run', 'train', *(('--output', tmp_path / 'file' / 'runs') if by == 'option' else ('-c', 'recipe.yaml'))],
        f'--output={re.escape(repr(str(tmp_path / "file" / "runs")))} cannot be written to')


@pytest.mark.skipif(torch.accelerator.is_available(), reason='torch finds an accelerator: run it where there is none')
def test_train_takes_device_classes_and_size_that_nobody_gave_and_says_so(train, classes, tmp_path):
    (tmp_path / 'recipe.yaml').write_text('pretrained: true\ndataset: ""\n')
    _, out, err = train('-c', 'recipe.yaml', '--model', 'finet_small_g4.cifar10', '--data-dir', 'data')
    args = json.loads(out)
    assert (args['device'], args['num_classes']) == ('cpu', 4)
    assert err == (
        'timm-finet run train: uses --num-classes 4, --device cpu, --img-size 32 from the weights, '
        'as nothing else was given.\n')


@pytest.mark.parametrize('by', ['option', 'config'])
def test_device_that_was_given_stays(by, train, tmp_path):
    (tmp_path / 'recipe.yaml').write_text('device: meta\n')
    _, out, err = train('--device', 'meta') if by == 'option' else train('-c', 'recipe.yaml')
    assert json.loads(out)['device'] == 'meta' and err == ''


@pytest.mark.parametrize('size', [['--img-size', '64'], ['--input-size', '3']])
def test_size_that_was_given_stays(size, train, classes, tmp_path):
    args = ['--pretrained', '--dataset', '', '--data-dir', 'data', '--model', 'finet_small_g4.cifar10', *size]
    status, out, err = train(*args)
    assert status == 0 and '--img-size 32' not in err and json.loads(out)[size[0][2:].replace('-', '_')] == int(size[1])


@pytest.mark.parametrize('rank, says', [('0', True), ('1', False)])
def test_of_several_processes_the_first_speaks(rank, says, train, classes, monkeypatch):
    monkeypatch.setenv('RANK', rank)
    status, out, err = train('--dataset', '', '--data-dir', 'data')
    assert json.loads(out)['num_classes'] == 4 and ('uses --num-classes 4' in err) == says


@pytest.mark.parametrize('args', [
    ['--dataset', 'torch/cifar10_sample'],
    ['--dataset', 'torch/cifar10_pad2', '--data-dir', 'none', '--dataset-download']])
def test_data_that_need_no_folder_or_are_yet_to_come_are_not_asked_for(args, train):
    status, out, err = train(*args)
    assert status == 0 and json.loads(out)['num_classes'] == 10, err


VALIDATE = '''
import argparse
parser = argparse.ArgumentParser()
parser.add_argument('data', nargs='?')
for name in ('data-dir', 'dataset', 'split', 'model', 'checkpoint'):
    parser.add_argument(f'--{name}', default='hfids/x' if name == 'dataset' else '')
parser.add_argument('--num-classes', type=int)
if __name__ == '__main__':
    print(parser.parse_args().model)
'''


@pytest.mark.parametrize('model', ['', 'all', 'finet_*', 'resnet?8', 'names.txt'])
def test_validate_takes_patterns_and_files_of_names(model, script, cli, monkeypatch):
    script.write_text(VALIDATE)
    monkeypatch.chdir(script.parent)
    Path('names.txt').write_text('finet_small')
    assert cli('run', 'validate', '--model', model) == (0, f'{model}\n', '')


@pytest.mark.parametrize('split, right', [('validation', 3), ('train', 4)])
def test_validate_counts_the_classes_of_its_split(split, right, script, cli, refused, classes):
    script.write_text(VALIDATE)
    data = script.parent / 'data'
    for folder in sorted((data / 'train').iterdir())[:3]:
        shutil.copytree(folder, data / 'validation' / folder.name)
    args = ['run', 'validate', '--dataset', '', '--data-dir', data, '--split', split, '--model', 'finet_small']
    assert cli(*args, '--num-classes', right)[0] == cli(*args)[0] == 0
    refused([*args, '--num-classes', right + 1], f'--num-classes={right + 1} does not fit: the data set has {right} cl')
    refused([*args, '--num-classes', 2], f'--num-classes=2 does not fit: the data set has {right} classes')


BAD = dict(
    model=(['--model', 'finet_smal'], "--model='finet_smal' is unknown: did you mean finet_small"),
    tag=(['--model', 'finet_small_g4.cifar'], "--model='finet_small_g4.cifar' is unknown: "),
    no_data=(['--dataset', 'torch/cifar10_pad2'], '--data-dir is missing'),
    data=(['--dataset', '', '--data-dir', 'none'], "--data-dir='none' does not exist"),
    empty=(['--dataset', '', '--data-dir', 'empty'], "--data-dir='empty': Found 0 images"),
    resume=(['--resume', 'no.pth.tar'], "--resume='no.pth.tar' does not exist"),
    initial=(['--initial-checkpoint', 'no.pth'], "--initial-checkpoint='no.pth' does not exist"),
    pretrained=(['--pretrained-path', 'no.pth'], "--pretrained-path='no.pth' does not exist"),
    classes=(
        ['--dataset', '', '--data-dir', 'data', '--num-classes', '10'], '--num-classes=10 does not fit: .* 4 classes'),
    untold=(['--pretrained', '--dataset', 'hfids/x'], '--num-classes is missing'),
    device=(['--device', 'gpu'], "--device='gpu' is not a device of torch: use cpu or cuda"),
    misspelt=(['--outptu', 'x'], 'unrecognized arguments: --outptu: did you mean --output\\?'),
    ambiguous=(['--data', 'x'], 'ambiguous option: --data could match --data-dir, --dataset'),
    no_number=(['--num-classes', 'x'], "argument --num-classes: invalid int value: 'x'$"),
    module=(['--device-modules', 'no_module'], "--device-modules='no_module' cannot be imported: No module named"),
)


@pytest.mark.parametrize('case', BAD)
def test_wrong_arguments_of_train_are_named_in_one_line(case, train, classes, refused):
    args, message = BAD[case]
    Path('empty').mkdir()
    refused(['run', 'train', *args], f'^timm-finet run train: .*{message}')


@pytest.mark.skipif(torch.cuda.is_available(), reason='torch finds a GPU: run it where there is none')
@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_gpu_that_is_not_there_is_named_in_one_line(device, train, refused):
    refused(['run', 'train', '--device', device],
            f"^timm-finet run train: --device='{device}' cannot be used because torch finds no such GPU here: "
            "use --device")


def test_network_of_a_module_of_ones_own_is_known(train, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'own_net.py').write_text("""
from timm.models import register_model
from timm_finet.finet import finet_small

@register_model
def net_of_ones_own(pretrained=False, **kwargs):
    return finet_small(pretrained, **kwargs)
""")
    _, out, _ = train('--device-modules', 'own_net', '--model', 'net_of_ones_own')
    assert json.loads(out)['model'] == 'net_of_ones_own'


def test_checkpoint_that_does_not_exist_is_named_before_validation(script, cli):
    script.write_text(
        'import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument("--checkpoint")\n'
        'if __name__ == "__main__":\n    parser.parse_args()\n    print(1)')
    assert cli('run', 'validate', '--checkpoint', 'no.pth') == (
        2, '', "timm-finet run validate: --checkpoint='no.pth' does not exist.\n")


@pytest.mark.parametrize('caught', [True, False])
def test_interrupted_training_ends_in_one_line_and_status_130(caught, script, cli):
    wait, end = 'raise_signal(SIGINT)\n    time.sleep(60)\n', 'except KeyboardInterrupt:\n    pass\nprint("end")'
    (script.parent / 'train.py').write_text(
        f'import time\nfrom signal import *\ntry:\n    {wait}{end if caught else "finally: pass"}')
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    assert cli('run', 'train') == (130, 'end\n' if caught else '', 'timm-finet run: interrupted.\n')


def test_folder_of_scripts_without_the_script_is_named(monkeypatch):
    monkeypatch.setenv('TIMM_SCRIPTS', '/nope')
    with pytest.raises(FileNotFoundError, match="TIMM_SCRIPTS='/nope' holds no train.py"):
        launch.find_script('train')


def test_full_disk_is_refused_before_training(tmp_path):
    resource = pytest.importorskip('resource', reason='limits the size of files: run it on Linux or macOS')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match='cannot be written to.*64 MB'):
            arguments.check_output(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    arguments.check_output(str(tmp_path / 'new' / 'folder'))
    assert not list(tmp_path.iterdir())
