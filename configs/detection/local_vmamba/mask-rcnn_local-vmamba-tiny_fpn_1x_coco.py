# The weights of tiny have not been published; `--cfg-options model.backbone.checkpoint=FILE` starts from a file.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="local_vmamba_tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
