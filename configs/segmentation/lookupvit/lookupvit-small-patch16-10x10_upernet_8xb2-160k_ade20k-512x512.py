# No such run is published, and no weights: name those of a classifier by checkpoint=. All scales come from the last map
# of lookup tokens (ViTDet's simple feature pyramid).
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="lookupvit_small_patch16_10x10", out_indices=(-1,), drop_path_rate=0.1),
    neck=dict(type="visionbb.SimpleFeaturePyramid", in_channels=384, out_channels=384),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    constructor="visionbb.TimmLayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.85),
)
