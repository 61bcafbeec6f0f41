_base_ = "cascade-mask-rcnn_dinat-mini_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="dinat_large.in22k", drop_path_rate=0.6),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=7.5e-5))  # the authors train this one in single precision
