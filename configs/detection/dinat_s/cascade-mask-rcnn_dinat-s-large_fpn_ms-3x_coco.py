_base_ = "cascade-mask-rcnn_dinat-s-tiny_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(
        model_name="dinat_s_large.in22k",
        drop_path_rate=0.6,
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
