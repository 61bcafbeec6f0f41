# The authors publish no such run: the usual schedule, their drop path of the nearest one.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="dinat_tiny",
        pretrained=True,
        drop_path_rate=0.2,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
