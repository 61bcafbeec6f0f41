_base_ = "cascade-mask-rcnn_stvit-r-swin-small_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(model_name="stvit_r_swin_base", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
