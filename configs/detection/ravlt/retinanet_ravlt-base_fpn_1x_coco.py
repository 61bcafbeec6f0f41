_base_ = "retinanet_ravlt-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="ravlt_base", drop_path_rate=0.4),
    neck=dict(in_channels=[192, 384, 512]),
)
