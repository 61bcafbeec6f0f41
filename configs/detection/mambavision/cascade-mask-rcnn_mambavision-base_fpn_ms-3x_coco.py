# Drop path stays at 0.2: the authors' backbone class ignores the 0.5 of its config.
_base_ = "cascade-mask-rcnn_mambavision-tiny_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="mambavision_base"),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
