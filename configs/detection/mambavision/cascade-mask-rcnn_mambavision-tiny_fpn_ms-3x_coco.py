# The authors' schedule and windows, which are whole maps.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="mambavision_tiny", pretrained=True, drop_path_rate=0.2, window_size=(0, 0, 112, 56)
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
