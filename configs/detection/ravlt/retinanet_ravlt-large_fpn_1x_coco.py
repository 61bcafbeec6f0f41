_base_ = "retinanet_ravlt-tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="ravlt_large", drop_path_rate=0.55),
    neck=dict(in_channels=[192, 448, 640]),
)
