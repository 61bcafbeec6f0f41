# A small UPerNet on scenes of handwritten digits. It does not learn them yet: it stays at background alone.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/digit_scenes.py",
    "_base_/schedules/160k.py",
    "_base_/default_runtime.py",
]

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[64.0] * 3, size=(128, 128)),
    backbone=dict(model_name="nat_digits"),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=64, pool_scales=(1, 2), num_classes=11, norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=11, norm_cfg=norm_cfg),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=0.9, eta_min=1e-5, begin=50, end=1500, by_epoch=False),
]
train_cfg = dict(max_iters=1500, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=500))
randomness = dict(seed=0)
