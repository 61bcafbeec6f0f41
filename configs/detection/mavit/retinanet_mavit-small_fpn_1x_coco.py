_base_ = "retinanet_mavit-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="mavit_small", drop_path_rate=0.15),
    neck=dict(in_channels=[128, 320, 512]),
)
