# As the authors do it, four maps of one resolution, from blocks at every quarter of the depth.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="plainmamba_l1", out_indices=(5, 11, 17, 23), pretrained=True, drop_path_rate=0.1),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3),
)
optim_wrapper = dict(
    type="OptimWrapper",  # the authors train in single precision
    constructor="visionbb.TimmLayerDecayConstructor",  # asks the model what to keep from weight decay
    paramwise_cfg=dict(_delete_=True, layer_decay=1.0),
)
