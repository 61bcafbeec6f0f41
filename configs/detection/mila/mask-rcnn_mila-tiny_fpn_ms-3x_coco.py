_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="mila_tiny", pretrained=True, drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
