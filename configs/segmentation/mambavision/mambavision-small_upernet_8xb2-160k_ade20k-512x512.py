# The authors' schedule and windows, which hold crops whole. Drop path stays at 0.2: their backbone class ignores the
# 0.7 of its config.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="mambavision_small", pretrained=True, drop_path_rate=0.2, window_size=(0, 0, 160, 56)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
