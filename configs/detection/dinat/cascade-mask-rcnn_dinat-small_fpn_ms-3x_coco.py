_base_ = "cascade-mask-rcnn_dinat-mini_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="dinat_small", drop_path_rate=0.5),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
