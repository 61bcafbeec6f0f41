_base_ = "local-vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="local_vmamba_small", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(type="AmpOptimWrapper")
