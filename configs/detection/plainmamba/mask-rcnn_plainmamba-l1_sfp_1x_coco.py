# The authors' schedule and box head, but not their adapter: all scales come from the last map (ViTDet's simple feature
# pyramid).
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="plainmamba_l1", out_indices=(-1,), pretrained=True, drop_path_rate=0.1),
    neck=dict(_delete_=True, type="visionbb.SimpleFeaturePyramid", in_channels=192, num_outs=5),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=dict(type="SyncBN", requires_grad=True))),
)
optim_wrapper = dict(
    type="OptimWrapper",  # the authors train in single precision
    constructor="visionbb.TimmLayerDecayConstructor",  # asks the model what to keep from weight decay
    paramwise_cfg=dict(_delete_=True, layer_decay=1.0),
)
