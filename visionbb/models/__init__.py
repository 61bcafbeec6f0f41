"""One file a family; importing one registers its models with timm."""
from . import nat, nat_isotropic, ravlt

__all__ = ["nat", "nat_isotropic", "ravlt"]
