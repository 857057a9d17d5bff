"""Records of the data sets that weights are trained on, shared by networks, cards, commands and scripts."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

__all__ = ['CIFAR10', 'CIFAR100', 'DATASETS', 'FOLDERS', 'IMAGENET', 'TINY_IN200', 'UNKNOWN', 'WEIGHTS', 'Dataset']

WEIGHTS = Path(__file__).parents[1] / 'weights'


@dataclass(frozen=True)
class Dataset:
    """A data set for image classification.

    Args:
        hub: Its name on the Hub.
        title: Its name in a sentence.
        classes: The names of its classes, in the order of a network's outputs; None if they are not known.
        split: The split that networks are tested on.
        split_of: The title of the data set that this split belongs to, if it is another one.
        terms: Terms of use, as the end of a sentence that begins with 'The photographs of' and `title`.
        license: The licence of weights trained on it, as in a card's metadata; None if it is not known.
        size: Height and width of training images, in pixels.
        test_size: Height and width of test images, in pixels; None if it is `size`.
        pool_size: Height and width of the last feature map at `size`.
        mean, std: Mean and standard deviation of its RGB pixels, which are between 0 and 1.
        crop_pct, interpolation: As in timm's cfgs.
    """

    hub: str
    title: str
    classes: Optional[Tuple[str, ...]] = None
    split: str = 'validation'
    split_of: Optional[str] = None
    terms: str = ''
    license: Optional[str] = None
    size: int = 224
    test_size: Optional[int] = None
    pool_size: int = 7
    mean: Tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: Tuple[float, float, float] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    interpolation: str = 'bilinear'

    def cfg(self) -> Dict[str, Any]:
        """Entries of timm's cfg for weights trained on this data set."""
        cfg = dict(
            description=f'trained on {self.title}', license=self.license, num_classes=len(self.classes),
            label_names=self.classes, input_size=(3, self.size, self.size),
            pool_size=(self.pool_size, self.pool_size), crop_pct=self.crop_pct, interpolation=self.interpolation,
            mean=self.mean, std=self.std)
        if self.test_size is not None:
            cfg['test_input_size'] = (3, self.test_size, self.test_size)
        return cfg


def names_in(file: str) -> Tuple[str, ...]:
    return tuple((WEIGHTS / file).read_text(encoding='utf-8').splitlines())


OF_CIFAR = 'were collected from the web for research and come without a licence'
OF_IMAGENET = 'are from ImageNet and may be used only for non-commercial research and teaching'

CIFAR10 = Dataset(
    'uoft-cs/cifar10', 'CIFAR-10',
    ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
    split='test', terms=OF_CIFAR, license='other', size=32, pool_size=4, crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100 = replace(
    CIFAR10, hub='uoft-cs/cifar100', title='CIFAR-100', classes=names_in('cifar100.txt'),
    mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
TINY_IN200 = Dataset(
    'zh-plus/tiny-imagenet', 'Tiny-ImageNet-200', names_in('tiny_in200.txt'), terms=OF_IMAGENET, license='other',
    size=128, test_size=160, pool_size=4, crop_pct=1.0, interpolation='bicubic')
IMAGENET = Dataset('ILSVRC/imagenet-1k', 'ImageNet-1k', terms=OF_IMAGENET)
UNKNOWN = Dataset('imagefolder', "the owner's images")

DATASETS = {  # by the tag of weights, and by train.py's --dataset
    'cifar10': CIFAR10, 'torch/cifar10': CIFAR10, 'torch/cifar10_pad2': CIFAR10, 'torch/cifar10_gpu': CIFAR10,
    'cifar100': CIFAR100, 'torch/cifar100': CIFAR100, 'torch/cifar100_pad2': CIFAR100, 'torch/cifar100_gpu': CIFAR100,
    'torch/cifar10_first1000': replace(
        CIFAR10, title='the first 1,000 training images of each class of CIFAR-10', split_of=CIFAR10.title),
    'torch/cifar100_first100': replace(
        CIFAR100, title='the first 100 training images of each class of CIFAR-100', split_of=CIFAR100.title),
    'torch/cifar10_sample': Dataset(
        'imagefolder', '300 of the shipped test images of CIFAR-10', CIFAR10.classes, terms=OF_CIFAR,
        split_of='the other 100 of the shipped test images of CIFAR-10'),
    'in1k': IMAGENET, 'torch/imagenet': IMAGENET, 'tiny_in200': TINY_IN200,
}
# train.py's --dataset for one folder per class; '' is also for a tar of such folders
FOLDERS = ('', 'torch/folder', 'torch/image_folder', 'torch/photographs')
