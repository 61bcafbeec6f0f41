# The authors' schedule, but not their ViT-Adapter: all scales come from the last map (ViTDet's simple feature pyramid).
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="vrwkv_tiny", out_indices=(-1,), pretrained=True, drop_path_rate=0.1),
    neck=dict(_delete_=True, type="visionbb.SimpleFeaturePyramid", in_channels=192, num_outs=5),
)
optim_wrapper = dict(
    type="OptimWrapper",  # the authors train in single precision
    optimizer=dict(lr=2e-4, weight_decay=0.01),
    constructor="visionbb.TimmLayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.85),
)
