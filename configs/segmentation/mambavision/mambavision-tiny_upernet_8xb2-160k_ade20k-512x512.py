# The authors' schedule and windows, which hold crops whole. Drop path stays at 0.2: their backbone class ignores the
# 0.3 of its config.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="mambavision_tiny", pretrained=True, drop_path_rate=0.2, window_size=(0, 0, 64, 32)),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
