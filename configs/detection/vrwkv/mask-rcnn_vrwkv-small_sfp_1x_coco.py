_base_ = "mask-rcnn_vrwkv-tiny_sfp_1x_coco.py"

model = dict(backbone=dict(model_name="vrwkv_small", drop_path_rate=0.2), neck=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
