"""Token reduction around any ViT, timm's included: `reduce_tokens(model, "tome", r=13)`, `remove_reduction(model)`.

A method scores the patch tokens of a block, matches those that go with those that stay, and fuses them. All else is
done once, for all methods: how blocks are taken apart (`blocks.py`), what the models around them do (`models.py`), the
state that is handed from block to block (`state.py`), schedules and budgets (`schedule.py`). `method.py` says how to
write another method.
"""
from .algm import ALGM
from .api import reduce_tokens, remove_reduction
from .as_vit import ASViT, budget_loss
from .calibrate import calibrate
from .context import BlockContext
from .diffrate import DiffRate
from .draw import merged_patches
from .dynamic_vit import DynamicViT, ratio_loss
from .evit import EViT
from .ia_red2 import IARED2
from .mctf import MCTF
from .method import METHODS, Method, keep_padded, keep_tokens, merge_mean, merge_sizes
from .pitome import PiToMe
from .report import Reduction, ReductionReport
from .state import Assignment, TokenState
from .tofu import ToFu
from .tome import ToMe
from .zero_tprune import ZeroTPrune

__all__ = [
    "ALGM", "IARED2", "MCTF", "METHODS", "ASViT", "Assignment", "BlockContext", "DiffRate", "DynamicViT", "EViT",
    "Method", "PiToMe", "Reduction", "ReductionReport", "ToFu", "ToMe", "TokenState", "ZeroTPrune", "budget_loss",
    "calibrate", "keep_padded", "keep_tokens", "merge_mean", "merge_sizes", "merged_patches", "ratio_loss",
    "reduce_tokens", "remove_reduction",
]
