_base_ = "mask-rcnn_plainmamba-l1_sfp_1x_coco.py"

model = dict(backbone=dict(model_name="plainmamba_l3", drop_path_rate=0.3), neck=dict(in_channels=448))
