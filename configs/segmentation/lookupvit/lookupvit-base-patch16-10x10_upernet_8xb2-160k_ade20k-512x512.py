_base_ = "lookupvit-small-patch16-10x10_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="lookupvit_base_patch16_10x10", drop_path_rate=0.3),
    neck=dict(in_channels=768, out_channels=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
