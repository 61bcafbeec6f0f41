"""One file a family; importing one registers its models with timm."""
from . import care, drop_ins, flowformer, l2vit, medmamba, mila, nat, nat_isotropic, ravlt, soft, vmamba, vssd
from .drop_ins import inherit_attention

__all__ = [
    "care", "drop_ins", "flowformer", "inherit_attention", "l2vit", "medmamba", "mila", "nat", "nat_isotropic", "ravlt",
    "soft", "vmamba", "vssd",
]
