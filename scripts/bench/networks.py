"""Networks of many packages, small and with random weights: name, and a function that builds one and its inputs."""
import timm
import torch

TIMM_PARAMS = 12e6

X = torch.rand(2, 3, 64, 64, dtype=torch.float64)
LARGER = torch.rand(1, 3, 224, 224, dtype=torch.float64)


def in_turn():
    """All names of timm, one of each of its modules, then the next of each: alike ones come late."""
    turns = {}
    for module in sorted({timm.models._registry._model_to_module[name] for name in timm.list_models()}):
        for turn, name in enumerate(timm.list_models(module=module)):
            turns.setdefault(turn, []).append(name)
    return [name for turn in sorted(turns) for name in turns[turn]]


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
        'Linknet': ['resnet18', 'mobilenet_v2'], 'FPN': ['resnet18', 'mit_b0', 'tu-regnetx_002'],
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
    from torchvision import models
    for name in (
            'fasterrcnn_resnet50_fpn', 'fasterrcnn_resnet50_fpn_v2', 'fasterrcnn_mobilenet_v3_large_fpn',
            'fasterrcnn_mobilenet_v3_large_320_fpn', 'fcos_resnet50_fpn', 'keypointrcnn_resnet50_fpn',
            'maskrcnn_resnet50_fpn', 'retinanet_resnet50_fpn', 'retinanet_resnet50_fpn_v2',
            'ssdlite320_mobilenet_v3_large'):
        sizes = {} if 'ssdlite' in name else {'min_size': 96, 'max_size': 96}
        keep = {}  # of some, so that there are detections to compare
        if name.startswith(('keypointrcnn', 'fasterrcnn_mobilenet')):
            keep = {'box_score_thresh': 0., 'box_detections_per_img': 10}
        elif name in ('retinanet_resnet50_fpn_v2', 'fcos_resnet50_fpn'):
            keep = {'score_thresh': 0.}
        yield f'detection.{name}', lambda name=name, kwargs={**sizes, **keep}: (
            models.get_model(name, weights=None, weights_backbone=None, **kwargs), ([X[0]],))
    for name in ('fcn_resnet50', 'deeplabv3_resnet50', 'deeplabv3_mobilenet_v3_large', 'lraspp_mobilenet_v3_large'):
        yield f'segmentation.{name}', lambda name=name: (
            models.get_model(name, weights=None, weights_backbone=None), X)
    for name in ('r3d_18', 'mc3_18', 'r2plus1d_18', 's3d'):
        frames = 16 if name == 's3d' else 4
        yield f'video.{name}', lambda name=name, frames=frames: (
            models.get_model(name, weights=None), torch.rand(1, 3, frames, 32, 32, dtype=torch.float64), torch.rand(
                1, 3, 16, 224, 224, dtype=torch.float64))
    for name in (
            'resnet18', 'vgg11_bn', 'densenet121', 'googlenet', 'inception_v3', 'mnasnet0_5', 'mobilenet_v2',
            'mobilenet_v3_small', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'efficientnet_b0', 'resnext50_32x4d'):
        yield name, lambda name=name: (models.get_model(name, weights=None), X, LARGER)


def of_monai():
    from monai.networks import nets
    volume = torch.rand(1, 1, 32, 32, 32, dtype=torch.float64)
    image = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    batch = {'norm': 'batch'}
    kernels = {'kernel_size': [3, 3, 3], 'strides': [1, 2, 2], 'upsample_kernel_size': [2, 2]}
    builders = {
        'DenseNet121 2D': lambda: (nets.DenseNet121(2, 1, 2), image),
        'DenseNet121 3D': lambda: (nets.DenseNet121(3, 1, 2), volume),
        'EfficientNetBN b0': lambda: (nets.EfficientNetBN('efficientnet-b0', False, in_channels=1), image),
        'resnet10 3D': lambda: (nets.resnet10(n_input_channels=1), volume),
        'SEResNet50 2D': lambda: (nets.SEResNet50(spatial_dims=2, in_channels=1), image),
        'UNet 3D': lambda: (nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, **batch), volume),
        'BasicUNet 3D': lambda: (nets.BasicUNet(3, 1, 2, (8, 8, 16, 16, 32, 8), **batch), volume),
        'BasicUNetPlusPlus 2D': lambda: (nets.BasicUNetPlusPlus(2, 1, 2, (8, 8, 16, 16, 32, 8), **batch), image),
        'AttentionUnet 2D': lambda: (nets.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), image),
        'DynUNet 3D': lambda: (nets.DynUNet(3, 1, 2, norm_name='batch', **kernels), volume),
        'SegResNet 3D': lambda: (nets.SegResNet(3, 8, 1, 2, norm='batch'), volume),
        'VNet 3D': lambda: (nets.VNet(), volume),
        'FlexibleUNet 2D': lambda: (nets.FlexibleUNet(1, 2, 'efficientnet-b0', spatial_dims=2), image),
        'HighResNet 3D': lambda: (nets.HighResNet(3, 1, 2), volume),
        'RegUNet 2D': lambda: (nets.RegUNet(2, 1, 4, 2, out_channels=2), image),
    }
    yield from builders.items()


def of_efficientnet_pytorch():
    from efficientnet_pytorch import EfficientNet
    for i in range(3):
        yield f'efficientnet-b{i}', lambda i=i: (EfficientNet.from_name(f'efficientnet-b{i}'), X)


def of_transformers():
    import transformers as t

    pixels = {'pixel_values': X}
    small = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    features = dict(out_features=['stage2', 'stage3', 'stage4'])
    resnet = t.ResNetConfig(**small, **features)
    detr = dict(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=t.ResNetConfig(**small),
        num_queries=5, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2)
    rtdetr = dict(
        d_model=32, encoder_hidden_dim=32, encoder_in_channels=[32, 64, 128], encoder_ffn_dim=32, decoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2, num_queries=10,
        decoder_in_channels=[32, 32, 32])
    rtdetr_resnet = t.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], **features)
    conformer = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    audio = dict(**conformer, conv_dim=[8, 8], conv_kernel=[8, 4], conv_stride=[8, 4], num_conv_pos_embeddings=8,
                 num_conv_pos_embedding_groups=2)
    timm_backbone = dict(backbone='resnet10t', use_timm_backbone=True, use_pretrained_backbone=False)

    builders = {
        'ResNetForImageClassification': lambda: (t.ResNetForImageClassification(t.ResNetConfig(**small)), pixels),
        'ResNetForImageClassification basic': lambda: (
            t.ResNetForImageClassification(t.ResNetConfig(layer_type='basic', **small)), pixels),
        'ResNetBackbone': lambda: (t.ResNetBackbone(resnet), pixels),
        'RegNetForImageClassification': lambda: (
            t.RegNetForImageClassification(t.RegNetConfig(groups_width=8, **small)), pixels),
        'RegNetForImageClassification x': lambda: (
            t.RegNetForImageClassification(t.RegNetConfig(groups_width=8, layer_type='x', **small)), pixels),
        'MobileNetV1ForImageClassification': lambda: (
            t.MobileNetV1ForImageClassification(t.MobileNetV1Config(image_size=64, depth_multiplier=0.25)), pixels),
        'MobileNetV2ForImageClassification': lambda: (
            t.MobileNetV2ForImageClassification(t.MobileNetV2Config(image_size=64, depth_multiplier=0.35)), pixels),
        'MobileNetV2ForSemanticSegmentation': lambda: (
            t.MobileNetV2ForSemanticSegmentation(t.MobileNetV2Config(image_size=64, depth_multiplier=0.35)), pixels),
        'MobileViTForImageClassification': lambda: (
            t.MobileViTForImageClassification(t.MobileViTConfig(image_size=64)), pixels),
        'MobileViTForSemanticSegmentation': lambda: (
            t.MobileViTForSemanticSegmentation(t.MobileViTConfig(image_size=64)), pixels),
        'MobileViTV2ForImageClassification': lambda: (
            t.MobileViTV2ForImageClassification(t.MobileViTV2Config(image_size=64, width_multiplier=0.5)), pixels),
        'MobileViTV2ForSemanticSegmentation': lambda: (
            t.MobileViTV2ForSemanticSegmentation(t.MobileViTV2Config(image_size=64, width_multiplier=0.5)), pixels),
        'SwiftFormerForImageClassification': lambda: (
            t.SwiftFormerForImageClassification(t.SwiftFormerConfig(embed_dims=[16, 16, 32, 32])), pixels),
        'EfficientNetForImageClassification': lambda: (
            t.EfficientNetForImageClassification(
                t.EfficientNetConfig(image_size=64, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640)),
            pixels),
        'LevitForImageClassification': lambda: (
            t.LevitForImageClassification(t.LevitConfig()), {'pixel_values': LARGER}),
        'HGNetV2ForImageClassification': lambda: (t.HGNetV2ForImageClassification(t.HGNetV2Config()), pixels),
        'SegformerForSemanticSegmentation': lambda: (
            t.SegformerForSemanticSegmentation(t.SegformerConfig(
                hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
                decoder_hidden_size=16)), pixels),
        'DetrForObjectDetection': lambda: (t.DetrForObjectDetection(t.DetrConfig(**detr)), pixels),
        'ConditionalDetrForObjectDetection': lambda: (
            t.ConditionalDetrForObjectDetection(t.ConditionalDetrConfig(**detr)), pixels),
        'TableTransformerForObjectDetection': lambda: (
            t.TableTransformerForObjectDetection(t.TableTransformerConfig(**detr)), pixels),
        'RTDetrForObjectDetection': lambda: (
            t.RTDetrForObjectDetection(t.RTDetrConfig(backbone_config=rtdetr_resnet, **rtdetr)), pixels),
        'RTDetrResNetBackbone': lambda: (t.RTDetrResNetBackbone(rtdetr_resnet), pixels),
        'UperNetForSemanticSegmentation': lambda: (
            t.UperNetForSemanticSegmentation(t.UperNetConfig(
                backbone_config=t.ResNetConfig(
                    **small, out_features=['stage1', 'stage2', 'stage3', 'stage4']), hidden_size=16,
                auxiliary_in_channels=16)), pixels),
        'BeitForSemanticSegmentation': lambda: (
            t.BeitForSemanticSegmentation(t.BeitConfig(
                image_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
                out_indices=[1, 2, 3, 4])), pixels),
        'Data2VecVisionForSemanticSegmentation': lambda: (
            t.Data2VecVisionForSemanticSegmentation(t.Data2VecVisionConfig(
                image_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
                out_indices=[0, 1, 2, 3])), pixels),
        'DPTForDepthEstimation': lambda: (
            t.DPTForDepthEstimation(t.DPTConfig(
                image_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
                backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
                use_batch_norm_in_fusion_residual=True)), pixels),
        'SuperPointForKeypointDetection': lambda: (t.SuperPointForKeypointDetection(t.SuperPointConfig()), pixels),
        'VitPoseForPoseEstimation': lambda: (
            t.VitPoseForPoseEstimation(t.VitPoseConfig(
                use_simple_decoder=False, backbone_config=t.VitPoseBackboneConfig(
                    image_size=(64, 64), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                    out_features=['stage1']))), pixels),
        'Wav2Vec2ConformerModel': lambda: (
            t.Wav2Vec2ConformerModel(t.Wav2Vec2ConformerConfig(**audio)),
            {'input_values': torch.randn(2, 1600, dtype=torch.float64)}),
        'ClapAudioModel': lambda: (
            t.ClapAudioModel(t.ClapAudioConfig(depths=[1, 1], num_attention_heads=[1, 1], patch_embeds_hidden_size=16)),
            {'input_features': torch.randn(1, 1, 1001, 64, dtype=torch.float64)}),
        'PatchTSTModel': lambda: (
            t.PatchTSTModel(t.PatchTSTConfig(
                num_input_channels=2, context_length=32, d_model=16, num_hidden_layers=1, num_attention_heads=2)),
            {'past_values': torch.randn(2, 32, 2, dtype=torch.float64)}),
        'PatchTSMixerModel': lambda: (
            t.PatchTSMixerModel(t.PatchTSMixerConfig(num_input_channels=2, context_length=32, norm_mlp='BatchNorm')),
            {'past_values': torch.randn(2, 32, 2, dtype=torch.float64)}),
        'TimmBackbone resnet10t': lambda: (
            t.TimmBackbone(t.TimmBackboneConfig(backbone='resnet10t', use_pretrained_backbone=False)), pixels),
        'DetrForObjectDetection timm': lambda: (
            t.DetrForObjectDetection(t.DetrConfig(**{**detr, 'backbone_config': None, **timm_backbone})), pixels),
    }
    yield from builders.items()


def networks():
    """Package, name and builder; packages that are not installed are passed by."""
    for package, of in (
            ('transformers', of_transformers), ('segmentation_models_pytorch', of_smp), ('ultralytics', of_ultralytics),
            ('torchvision', of_torchvision), ('monai', of_monai), ('efficientnet_pytorch', of_efficientnet_pytorch)):
        try:
            builders = list(of())
        except ImportError:
            continue
        for name, build in builders:
            yield package, name, build
    for name in in_turn():
        ours = timm.models._registry._model_to_module[name] in ('finet', 'resnet_fbn')
        yield 'timm_finet' if ours else 'timm', name, lambda name=name: build_timm(name)
