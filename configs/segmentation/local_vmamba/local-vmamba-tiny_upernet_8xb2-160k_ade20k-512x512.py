# The weights of tiny have not been published; `--cfg-options model.backbone.checkpoint=FILE` starts from a file.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="local_vmamba_tiny", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(type="OptimWrapper")  # the authors train tiny in single precision, small in mixed
