_base_ = "ravlt-small_fpn_8xb2-80k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="ravlt_base", drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
