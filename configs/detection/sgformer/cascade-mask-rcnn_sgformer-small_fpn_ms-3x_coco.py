# The authors publish no such run: the usual schedule, the drop path of ImageNet training.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="sgformer_small", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
