# A small Mask R-CNN that learns to find and outline handwritten digits in minutes on a CPU.
_base_ = [
    "_base_/models/mask-rcnn_fpn.py",
    "_base_/datasets/digit_scenes.py",
    "_base_/schedules/1x.py",
    "_base_/default_runtime.py",
]

model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[64.0] * 3),
    backbone=dict(model_name="nat_digits"),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[6], ratios=[1.0, 1.5, 2.2], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0), paramwise_cfg=dict(bias_decay_mult=0.0)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=1250, eta_min=1e-5, by_epoch=False, begin=0, end=1250),
]
train_cfg = dict(max_epochs=25, val_interval=5)
randomness = dict(seed=0)
