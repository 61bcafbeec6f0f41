_base_ = "cascade-mask-rcnn_dinat-mini_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="dinat_tiny", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
