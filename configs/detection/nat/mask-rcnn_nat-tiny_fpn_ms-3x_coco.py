_base_ = "mask-rcnn_nat-mini_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="nat_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
