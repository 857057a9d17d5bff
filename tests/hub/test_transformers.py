"""Networks saved for timm in transformers: loaded, fine-tuned by its Trainer, fused and saved again."""
import json
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import transformers  # its parts are imported as they are named, and take seconds

from timm_finet import fuse_fbn
from timm_finet.data.datasets import CIFAR10
from timm_finet.hub import push, save_for_hf
from timm_finet.images import TRAINING_IMAGES, shipped_images

NAME = 'finet_small_g4.cifar10'
IMAGES = shipped_images()[0][::40]


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / 'folder')


def inputs_of(model):
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model, use_test_size=True))
    return torch.stack([transform(image) for image in IMAGES])


@torch.inference_mode()
def logits(model, x):
    # A copy, as weights lie unaligned in a mapped file, where torch sums in another order.
    out = deepcopy(model).eval()(x)
    return getattr(out, 'logits', out)


@pytest.mark.parametrize('make', [
    lambda: timm.create_model(NAME, pretrained=True),
    lambda: fuse_fbn(timm.create_model(NAME, pretrained=True).eval()),
    lambda: timm.create_model('finet_small_se_g2', num_classes=7, small_input=True, act_place='output'),
    lambda: timm.create_model('resnet18_fbn_g4', num_classes=7),
    lambda: timm.create_model('resnet10t', num_classes=7),
], ids=['train form', 'fused', 'own arguments', 'resnet_fbn', "timm's own"])
def test_saved_network_is_the_same_in_transformers_and_in_timm(make, folder, randomise):
    model = make()
    names = list(model.pretrained_cfg.get('label_names') or ())
    model = model if names else randomise(model)
    save_for_hf(model, folder, safe_serialization=True)
    x = inputs_of(model)
    expected = logits(model, x)

    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processed = transformers.AutoImageProcessor.from_pretrained(folder)(IMAGES)['pixel_values']
    assert torch.equal(processed, x) and torch.equal(logits(wrapped, processed), expected)
    names_by_index = dict(enumerate(names or [f'LABEL_{i}' for i in range(7)]))
    assert wrapped.config.id2label == names_by_index
    assert json.loads((Path(folder) / 'config.json').read_text()).get('label2id', {}) == {
        name: i for i, name in enumerate(names)}

    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(logits(again, x), expected)
    assert list(again.pretrained_cfg.get('label_names') or ()) == names


def test_pipeline_names_the_classes(folder):
    model = timm.create_model(NAME, pretrained=True)
    save_for_hf(model, folder, safe_serialization=True)
    probabilities, classes = logits(model, inputs_of(model)).softmax(1).max(1)
    answers = transformers.pipeline('image-classification', model=folder)(IMAGES)
    for answer, probability, index in zip(answers, probabilities, classes):
        assert answer[0]['label'] == CIFAR10.classes[index]
        assert answer[0]['score'] == pytest.approx(probability.item(), abs=1e-5)


def test_pushed_network_loads_by_its_name(hub, folder):
    model = timm.create_model(NAME, pretrained=True)
    save_for_hf(model, folder, safe_serialization=True)
    push(folder, 'me/net')
    wrapped = transformers.AutoModelForImageClassification.from_pretrained('me/net')
    x = transformers.AutoImageProcessor.from_pretrained('me/net')(IMAGES)['pixel_values']
    assert torch.equal(logits(wrapped, x), logits(model, x)) and wrapped.config.id2label[3] == 'cat'


@pytest.mark.slow
def test_network_tuned_by_the_trainer_is_fused_and_saved(folder, tmp_path):
    save_for_hf(timm.create_model(NAME, pretrained=True), folder, safe_serialization=True)
    names = {0: 'vehicle', 1: 'animal'}
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=2, id2label=names, ignore_mismatched_sizes=True)
    processor, before = transformers.AutoImageProcessor.from_pretrained(folder), deepcopy(model.state_dict())
    images, labels = shipped_images(TRAINING_IMAGES)
    data = [dict(pixel_values=x, labels=int(2 <= y <= 7)) for x, y in zip(processor(images)['pixel_values'], labels)]
    transformers.Trainer(model, transformers.TrainingArguments(
        str(tmp_path / 'run'), max_steps=3, per_device_train_batch_size=20, learning_rate=1e-3, save_strategy='no',
        report_to='none', use_cpu=True, disable_tqdm=True), train_dataset=data).train()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any('conv1.bn.running_var' in key for key in changed) and any('conv1.weight' in key for key in changed)

    x = processor(IMAGES)['pixel_values']
    tuned = logits(model, x)
    model.timm_model = fuse_fbn(model.timm_model.eval())
    assert not any('running_var' in key for key in model.state_dict())
    torch.testing.assert_close(logits(model, x), tuned, rtol=1e-4, atol=1e-4)

    model.config.model_args['fused'] = True  # the wrapper's own record, which it saves
    model.save_pretrained(folder)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder)
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(logits(wrapped, x), logits(model, x)) and torch.equal(logits(again, x), logits(model, x))
    assert wrapped.config.id2label == names and again.pretrained_cfg['label_names'] == ['vehicle', 'animal']
