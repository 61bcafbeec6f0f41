_base_ = "mask-rcnn_mavit-small_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="mavit_base", drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
