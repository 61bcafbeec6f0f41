_base_ = "mask-rcnn_mavit-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="mavit_large", drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
