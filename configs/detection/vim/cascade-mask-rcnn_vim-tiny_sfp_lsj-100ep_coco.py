# ViTDet's pyramid and, as the authors have them, its schedule, large-scale jitter and decay by layers, at 64 images.
# Theirs is detectron2's network; here the heads are those of the other configs (batch norm and GIoU loss in place of
# layer norm and L1). It begins with a Vim without class token and with rotary embeddings, of which no weights are
# published.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="vim_tiny", out_indices=(-1,), pretrained=True, drop_path_rate=0.1, out_norm=False),
    neck=dict(_delete_=True, type="visionbb.SimpleFeaturePyramid", in_channels=192, num_outs=5),
    rpn_head=dict(num_convs=2),
)

size = (1024, 1024)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute", crop_size=size, recompute_bbox=True, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="Pad", size=size, pad_val=dict(img=(104, 116, 124), masks=0)),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    constructor="visionbb.TimmLayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.837),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", begin=0, end=100, by_epoch=True, milestones=[89, 96], gamma=0.1),
]
train_cfg = dict(max_epochs=100, val_interval=10)
auto_scale_lr = dict(base_batch_size=64)
