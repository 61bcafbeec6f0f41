# The authors' schedule, head and pyramid, of maps from blocks at every quarter of the depth. Theirs begins with a Vim
# without class token, of which no weights are published, and takes what a block's mixer gives for its map; here, as
# for the small one, the sum that the block hands on.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="vim_tiny", out_indices=(5, 11, 17, 23), pretrained=True, drop_path_rate=0.1),
    neck=dict(type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    type="OptimWrapper",  # the authors train in single precision
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    constructor="visionbb.TimmLayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.92),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
auto_scale_lr = dict(base_batch_size=32)
