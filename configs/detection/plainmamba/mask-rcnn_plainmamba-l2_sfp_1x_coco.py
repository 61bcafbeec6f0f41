_base_ = "mask-rcnn_plainmamba-l1_sfp_1x_coco.py"

model = dict(backbone=dict(model_name="plainmamba_l2", drop_path_rate=0.2), neck=dict(in_channels=384))
