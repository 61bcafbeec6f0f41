_base_ = "mavit-tiny_fpn_8xb2-80k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="mavit_small", drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
