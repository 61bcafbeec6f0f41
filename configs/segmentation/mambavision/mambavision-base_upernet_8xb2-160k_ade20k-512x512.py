# The authors' schedule and windows, which hold crops whole. Drop path stays at 0.2: their backbone class ignores the
# 0.4 of its config.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="mambavision_base", pretrained=True, drop_path_rate=0.2, window_size=(0, 0, 64, 32)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
