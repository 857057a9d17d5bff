"""Small networks of many packages with random weights: names, and functions that build a network and its inputs."""
import timm
import torch

TIMM_PARAMS = 12e6

X = torch.rand(2, 3, 64, 64, dtype=torch.float64)
LARGER = torch.rand(1, 3, 224, 224, dtype=torch.float64)


def of_timm():
    """All names, the first of each of timm's modules, then the second of each, so that similar ones come late."""
    modules = timm.models._registry._model_to_module
    turns = {}
    for module in sorted({modules[name] for name in timm.list_models()}):
        for turn, name in enumerate(timm.list_models(module=module)):
            turns.setdefault(turn, []).append(name)
    for name in (name for turn in sorted(turns) for name in turns[turn]):
        yield 'timm_finet' if modules[name] in ('finet', 'resnet_fbn') else 'timm', name, lambda name=name: (
            build_timm(name))


def build_timm(name):
    if sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) > TIMM_PARAMS:
        return None,
    model = timm.create_model(name)
    size = model.pretrained_cfg['input_size']
    large = torch.rand(1, *size, dtype=torch.float64)
    return (model, large) if model.pretrained_cfg.get('fixed_input_size') else (model, X[:1], large)


def of_smp():
    import segmentation_models_pytorch as smp
    encoders = {
        'Unet': ['resnet18', 'mobilenet_v2', 'efficientnet-b0', 'densenet121', 'vgg11_bn', 'xception', 'mobileone_s0',
                 'timm-efficientnet-b0', 'timm-mobilenetv3_small_075', 'tu-resnest14d', 'tu-ghostnet_050', 'dpn68'],
        'UnetPlusPlus': ['resnet18', 'mobilenet_v2'], 'MAnet': ['resnet18', 'efficientnet-b0'],
        'Linknet': ['resnet18', 'mobilenet_v2'], 'FPN': ['resnet18', 'tu-regnetx_002'],
        'PSPNet': ['resnet18', 'mobilenet_v2'], 'PAN': ['resnet18'], 'DeepLabV3': ['resnet18'],
        'DeepLabV3Plus': ['resnet18', 'mobilenet_v2'], 'UPerNet': ['resnet18', 'mobileone_s0'],
        'Segformer': ['mit_b0', 'resnet18'],
    }
    for architecture, names in encoders.items():
        for encoder in names:
            yield f'{architecture} {encoder}', lambda a=architecture, e=encoder: (
                getattr(smp, a)(e, encoder_weights=None, classes=3), torch.cat((X, X), 3).repeat(1, 1, 2, 1))


def of_ultralytics():
    from ultralytics.nn import tasks
    kinds = {'seg': tasks.SegmentationModel, 'pose': tasks.PoseModel, 'cls': tasks.ClassificationModel,
             'obb': tasks.OBBModel}
    for name in (
            'yolov3-tiny', 'yolov5n', 'yolov6n', 'yolov8n', 'yolov8n-seg', 'yolov8n-pose', 'yolov8n-obb', 'yolov8n-cls',
            'yolov9t', 'yolov10n', 'yolo11n', 'yolo11n-seg', 'yolo11n-pose', 'yolo12n', 'yolo26n'):
        kind = kinds.get(name.partition('-')[2], tasks.DetectionModel)
        yield name, lambda kind=kind, name=name: (kind(f'{name}.yaml', verbose=False), X)
    yield 'rtdetr-resnet50', lambda: (tasks.RTDETRDetectionModel('rtdetr-resnet50.yaml', verbose=False), X, LARGER)


def of_torchvision():
    from torchvision.models import get_model
    small = dict(min_size=96, max_size=96)
    keep = dict(box_score_thresh=0., box_detections_per_img=10)  # leaves some detections to compare
    detectors = {
        'fasterrcnn_resnet50_fpn': small, 'fasterrcnn_resnet50_fpn_v2': small,
        'fasterrcnn_mobilenet_v3_large_fpn': small | keep, 'fasterrcnn_mobilenet_v3_large_320_fpn': small | keep,
        'fcos_resnet50_fpn': small | dict(score_thresh=0.), 'keypointrcnn_resnet50_fpn': small | keep,
        'maskrcnn_resnet50_fpn': small, 'retinanet_resnet50_fpn': small,
        'retinanet_resnet50_fpn_v2': small | dict(score_thresh=0.), 'ssdlite320_mobilenet_v3_large': {}}
    for name, kwargs in detectors.items():
        yield f'detection.{name}', lambda name=name, kwargs=kwargs: (
            get_model(name, weights=None, weights_backbone=None, **kwargs), ([X[0]],))
    for name in ('fcn_resnet50', 'deeplabv3_resnet50', 'deeplabv3_mobilenet_v3_large', 'lraspp_mobilenet_v3_large'):
        yield f'segmentation.{name}', lambda name=name: (get_model(name, weights=None, weights_backbone=None), X)
    for name, frames in (('r3d_18', 4), ('mc3_18', 4), ('r2plus1d_18', 4), ('s3d', 16)):
        yield f'video.{name}', lambda name=name, frames=frames: (
            get_model(name, weights=None), torch.rand(1, 3, frames, 32, 32, dtype=torch.float64),
            torch.rand(1, 3, 16, 224, 224, dtype=torch.float64))
    for name in (
            'resnet18', 'vgg11_bn', 'densenet121', 'googlenet', 'inception_v3', 'mnasnet0_5', 'mobilenet_v2',
            'mobilenet_v3_small', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'efficientnet_b0', 'resnext50_32x4d'):
        yield name, lambda name=name: (get_model(name, weights=None), X, LARGER)


def of_monai():
    from monai.networks import nets
    volume = torch.rand(1, 1, 32, 32, 32, dtype=torch.float64)
    image = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    kernels = dict(kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2])
    builders = {  # by name, which ends in 3D if the input is a volume
        'DenseNet121 2D': lambda: nets.DenseNet121(2, 1, 2), 'DenseNet121 3D': lambda: nets.DenseNet121(3, 1, 2),
        'EfficientNetBN b0': lambda: nets.EfficientNetBN('efficientnet-b0', False, in_channels=1),
        'resnet10 3D': lambda: nets.resnet10(n_input_channels=1),
        'SEResNet50 2D': lambda: nets.SEResNet50(spatial_dims=2, in_channels=1),
        'UNet 3D': lambda: nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, norm='batch'),
        'BasicUNet 3D': lambda: nets.BasicUNet(3, 1, 2, (8, 8, 16, 16, 32, 8), norm='batch'),
        'BasicUNetPlusPlus 2D': lambda: nets.BasicUNetPlusPlus(2, 1, 2, (8, 8, 16, 16, 32, 8), norm='batch'),
        'AttentionUnet 2D': lambda: nets.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)),
        'DynUNet 3D': lambda: nets.DynUNet(3, 1, 2, norm_name='batch', **kernels),
        'SegResNet 3D': lambda: nets.SegResNet(3, 8, 1, 2, norm='batch'), 'VNet 3D': lambda: nets.VNet(),
        'FlexibleUNet 2D': lambda: nets.FlexibleUNet(1, 2, 'efficientnet-b0', spatial_dims=2),
        'HighResNet 3D': lambda: nets.HighResNet(3, 1, 2),
        'RegUNet 2D': lambda: nets.RegUNet(2, 1, 4, 2, out_channels=2),
    }
    for name, build in builders.items():
        yield name, lambda name=name, build=build: (build(), volume if name.endswith('3D') else image)


def of_efficientnet_pytorch():
    from efficientnet_pytorch import EfficientNet
    for i in range(3):
        yield f'efficientnet-b{i}', lambda i=i: (EfficientNet.from_name(f'efficientnet-b{i}'), X)


def of_transformers():
    import transformers
    small = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    stages = dict(out_features=['stage2', 'stage3', 'stage4'])
    rtdetr_backbone = dict(
        model_type='rt_detr_resnet', embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], **stages)
    rtdetr = dict(
        d_model=32, encoder_hidden_dim=32, encoder_in_channels=[32, 64, 128], encoder_ffn_dim=32, decoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2, num_queries=10,
        decoder_in_channels=[32, 32, 32])
    upernet_backbone = dict(model_type='resnet', **small, out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    vit = dict(image_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
    pose_backbone = vit | dict(
        model_type='vitpose_backbone', image_size=(64, 64), num_hidden_layers=1, out_features=['stage1'])
    patches = dict(num_input_channels=2, context_length=32)
    configs = {  # by the class's name, with a suffix that tells two of one class apart
        'ResNetForImageClassification': small, 'ResNetForImageClassification basic': dict(layer_type='basic', **small),
        'ResNetBackbone': small | stages, 'RegNetForImageClassification': dict(groups_width=8, **small),
        'RegNetForImageClassification x': dict(groups_width=8, layer_type='x', **small),
        'MobileNetV1ForImageClassification': dict(image_size=64, depth_multiplier=0.25),
        'MobileNetV2ForImageClassification': dict(image_size=64, depth_multiplier=0.35),
        'MobileNetV2ForSemanticSegmentation': dict(image_size=64, depth_multiplier=0.35),
        'MobileViTForImageClassification': dict(image_size=64),
        'MobileViTForSemanticSegmentation': dict(image_size=64),
        'MobileViTV2ForImageClassification': dict(image_size=64, width_multiplier=0.5),
        'MobileViTV2ForSemanticSegmentation': dict(image_size=64, width_multiplier=0.5),
        'SwiftFormerForImageClassification': dict(embed_dims=[16, 16, 32, 32]),
        'EfficientNetForImageClassification': dict(
            image_size=64, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
        'LevitForImageClassification': {}, 'HGNetV2ForImageClassification': {},
        'SegformerForSemanticSegmentation': dict(
            hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
            decoder_hidden_size=16),
        'RTDetrForObjectDetection': dict(backbone_config=rtdetr_backbone, **rtdetr),
        'RTDetrResNetBackbone': {key: value for key, value in rtdetr_backbone.items() if key != 'model_type'},
        'UperNetForSemanticSegmentation': dict(
            backbone_config=upernet_backbone, hidden_size=16, auxiliary_in_channels=16),
        'BeitForSemanticSegmentation': vit | dict(out_indices=[1, 2, 3, 4]),
        'Data2VecVisionForSemanticSegmentation': vit | dict(out_indices=[0, 1, 2, 3]),
        'DPTForDepthEstimation': vit | dict(
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            use_batch_norm_in_fusion_residual=True),
        'VitPoseForPoseEstimation': dict(use_simple_decoder=False, backbone_config=pose_backbone),
        'Wav2Vec2ConformerModel': dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8],
            conv_kernel=[8, 4], conv_stride=[8, 4], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2),
        'ClapAudioModel': dict(depths=[1, 1], num_attention_heads=[1, 1], patch_embeds_hidden_size=16),
        'PatchTSTModel': dict(d_model=16, num_hidden_layers=1, num_attention_heads=2, **patches),
        'PatchTSMixerModel': dict(norm_mlp='BatchNorm', **patches),
        'TimmBackbone resnet10t': dict(backbone='resnet10t', use_pretrained_backbone=False),
    }
    inputs = {
        'LevitForImageClassification': dict(pixel_values=LARGER),
        'Wav2Vec2ConformerModel': dict(input_values=torch.randn(2, 1600, dtype=torch.float64)),
        'ClapAudioModel': dict(input_features=torch.randn(1, 1, 1001, 64, dtype=torch.float64)),
        'PatchTSTModel': dict(past_values=torch.randn(2, 32, 2, dtype=torch.float64)),
        'PatchTSMixerModel': dict(past_values=torch.randn(2, 32, 2, dtype=torch.float64))}
    for name, config in configs.items():
        kind = getattr(transformers, name.split()[0])
        config_class = kind.config_class or transformers.TimmBackboneConfig
        yield name, lambda name=name, config=config_class(**config), kind=kind: (
            kind(config), inputs.get(name, dict(pixel_values=X)))


def networks():
    """Package, name and builder of all networks, except those of packages that are not installed."""
    for package, of in (
            ('transformers', of_transformers), ('segmentation_models_pytorch', of_smp), ('ultralytics', of_ultralytics),
            ('torchvision', of_torchvision), ('monai', of_monai), ('efficientnet_pytorch', of_efficientnet_pytorch)):
        try:
            builders = list(of())
        except ImportError:
            continue
        for name, build in builders:
            yield package, name, build
    yield from of_timm()
