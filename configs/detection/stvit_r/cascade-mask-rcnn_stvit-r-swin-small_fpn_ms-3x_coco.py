_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="stvit_r_swin_small", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
