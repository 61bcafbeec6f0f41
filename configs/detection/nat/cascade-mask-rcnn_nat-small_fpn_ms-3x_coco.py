_base_ = "cascade-mask-rcnn_nat-mini_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="nat_small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
