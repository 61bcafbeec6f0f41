"""Efficient vision backbones for timm: `import visionbb` registers every model with `timm.create_model`."""
from . import kernels, models, reduction
from ._version import __version__

__all__ = ["__version__", "kernels", "models", "reduction"]
