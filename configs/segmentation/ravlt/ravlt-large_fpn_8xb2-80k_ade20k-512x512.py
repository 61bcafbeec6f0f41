_base_ = "ravlt-small_fpn_8xb2-80k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="ravlt_large", drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
