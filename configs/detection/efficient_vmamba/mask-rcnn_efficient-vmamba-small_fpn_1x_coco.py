_base_ = "mask-rcnn_efficient-vmamba-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_small"),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
