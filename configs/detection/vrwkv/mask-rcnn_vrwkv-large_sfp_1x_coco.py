# The authors start from the weights of ImageNet-22k alone; these were also tuned on ImageNet-1k, at 384 pixels.
_base_ = "mask-rcnn_vrwkv-tiny_sfp_1x_coco.py"

model = dict(backbone=dict(model_name="vrwkv_large", drop_path_rate=0.4), neck=dict(in_channels=1024))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
