# The authors publish no such run: the usual schedule, their drop path of the nearest one.
_base_ = [
    "../_base_/models/fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/80k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="mila_tiny", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
