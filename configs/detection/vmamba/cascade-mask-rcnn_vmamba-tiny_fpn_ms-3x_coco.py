# The authors publish no such run: the usual schedule, their drop path of the nearest one.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="vmamba_tiny", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
