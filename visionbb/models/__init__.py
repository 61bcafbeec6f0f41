"""One file a family; importing one registers its models with timm."""
from . import (
    care,
    drop_ins,
    efficient_vmamba,
    flowformer,
    l2vit,
    local_vim,
    local_vmamba,
    lookupvit,
    mambavision,
    medmamba,
    mila,
    nat,
    nat_isotropic,
    plainmamba,
    ravlt,
    sg_former,
    soft,
    stvit,
    stvit_r,
    vim,
    vmamba,
    vrwkv,
    vssd,
)
from .drop_ins import inherit_attention

__all__ = [
    "care", "drop_ins", "efficient_vmamba", "flowformer", "inherit_attention", "l2vit", "local_vim", "local_vmamba",
    "lookupvit", "mambavision", "medmamba", "mila", "nat", "nat_isotropic", "plainmamba", "ravlt", "sg_former", "soft",
    "stvit", "stvit_r", "vim", "vmamba", "vrwkv", "vssd",
]
