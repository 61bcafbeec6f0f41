_base_ = "mask-rcnn_sgformer-small_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="sgformer_medium", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
