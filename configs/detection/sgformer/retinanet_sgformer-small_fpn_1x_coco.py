# The authors publish no such run: the usual schedule, the drop path of ImageNet training.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="sgformer_small", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=None)
