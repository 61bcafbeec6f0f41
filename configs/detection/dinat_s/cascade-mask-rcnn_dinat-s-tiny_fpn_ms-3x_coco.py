_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="dinat_s_tiny",
        pretrained=True,
        drop_path_rate=0.3,
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
