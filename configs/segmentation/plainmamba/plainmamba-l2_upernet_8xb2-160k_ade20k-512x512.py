_base_ = "plainmamba-l1_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="plainmamba_l2", drop_path_rate=0.2),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
