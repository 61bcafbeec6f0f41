_base_ = "vrwkv-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vrwkv_small", drop_path_rate=0.2),
    neck=dict(in_channels=384, out_channels=384),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay=0.85))
