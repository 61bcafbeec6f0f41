# The authors' schedule, but not their ViT-Adapter: all scales come from the last map (ViTDet's simple feature pyramid).
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="vrwkv_tiny", out_indices=(-1,), pretrained=True, drop_path_rate=0.1),
    neck=dict(type="visionbb.SimpleFeaturePyramid", in_channels=192, out_channels=192),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4),
    constructor="visionbb.TimmLayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.95),
)
