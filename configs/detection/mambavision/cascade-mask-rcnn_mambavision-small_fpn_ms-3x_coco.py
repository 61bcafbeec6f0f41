# Drop path stays at 0.2: the authors' backbone class ignores the 0.3 of its config.
_base_ = "cascade-mask-rcnn_mambavision-tiny_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="mambavision_small"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
