_base_ = "plainmamba-l1_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="plainmamba_l3", out_indices=(8, 17, 26, 35), drop_path_rate=0.3),
    decode_head=dict(in_channels=[448, 448, 448, 448]),
    auxiliary_head=dict(in_channels=448),
)
