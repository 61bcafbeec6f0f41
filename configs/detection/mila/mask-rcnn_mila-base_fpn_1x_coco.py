_base_ = "mask-rcnn_mila-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="mila_base", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
