"""The "visionbb" scope of mmengine's registries.

mmengine imports this module by name when a config says `type="visionbb.TimmBackbone"`, from mmdet and mmseg alike, and
`visionbb.mm` with it when it looks the class up. It needs mmengine; `import visionbb` does not import it.
"""
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry("model", parent=ROOT_MODELS, scope="visionbb", locations=["visionbb.mm"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=ROOT_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="visionbb",
    locations=["visionbb.mm"],
)
TRANSFORMS = Registry(
    "transform", parent=ROOT_TRANSFORMS, scope="visionbb", locations=["visionbb.mm.digit_scenes"]
)
