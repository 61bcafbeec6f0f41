# The authors start from the weights of ImageNet-22k alone; these were also tuned on ImageNet-1k, at 384 pixels.
_base_ = "vrwkv-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vrwkv_large", drop_path_rate=0.4),
    neck=dict(in_channels=1024, out_channels=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay=0.9))
