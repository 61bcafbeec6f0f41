_base_ = "vrwkv-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vrwkv_base", drop_path_rate=0.3),
    neck=dict(in_channels=768, out_channels=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay=0.8))
