_base_ = "cascade-mask-rcnn_nat-mini_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="nat_base", drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
