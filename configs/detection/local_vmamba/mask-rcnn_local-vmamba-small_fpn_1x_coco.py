_base_ = "mask-rcnn_local-vmamba-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="local_vmamba_small", pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
