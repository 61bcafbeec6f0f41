"""Shared 2-D ops: pure functions on channels-last tensors, one folder each; import as `visionbb.kernels`.

Every op has three paths that agree: `reference` (the definition), `portable` (plain PyTorch, any device, exportable)
and `triton` (fused GPU kernels). `use(...)` chooses one for a block of code, `VISIONBB_BACKEND` for a process.
"""
from ._dispatch import BACKENDS, has_triton, use
from ._flops import flop_formulas
from .neighborhood import merge_attentions, na2d, na2d_qkvpacked

__all__ = ["BACKENDS", "flop_formulas", "has_triton", "merge_attentions", "na2d", "na2d_qkvpacked", "use"]
