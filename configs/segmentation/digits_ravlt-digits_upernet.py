# A small UPerNet that learns scenes of handwritten digits in minutes on a CPU, from a backbone that knows single ones:
# python train/train.py --config configs/train/ravlt_digit_cutouts.yaml
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/digit_scenes.py",
    "_base_/schedules/160k.py",
    "_base_/default_runtime.py",
]

small = dict(channels=64, dropout_ratio=0.0, num_classes=11, norm_cfg=dict(type="BN", requires_grad=True))
# Which digit a stroke belongs to shows on coarse maps alone. Heads there learn it long before the decode head does,
# which sees fine maps, too, and is content with telling ink from paper at first. Most pixels are paper.
coarse = dict(
    type="FCNHead",
    num_convs=1,
    concat_input=False,
    align_corners=False,
    loss_decode=dict(type="CrossEntropyLoss", class_weight=[0.3] + [1.0] * 10),
    **small,
)
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[63.75] * 3, size=(128, 128)),
    backbone=dict(model_name="ravlt_digits", checkpoint="outputs/ravlt_digit_cutouts/model_best.pth.tar"),
    decode_head=dict(in_channels=[32, 64, 128, 256], pool_scales=(1, 2), **small),
    auxiliary_head=[dict(in_index=1, in_channels=64, **coarse), dict(in_index=2, in_channels=128, **coarse)],
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(lr=3e-3, weight_decay=0.02),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=2450, eta_min=1e-6, by_epoch=False, begin=50, end=2500),
]
train_cfg = dict(max_iters=2500, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=500))
randomness = dict(seed=0)
