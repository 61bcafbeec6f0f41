# The paper's schedule; the authors' file has 36 epochs at several scales.
_base_ = "mask-rcnn_efficient-vmamba-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_base"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
