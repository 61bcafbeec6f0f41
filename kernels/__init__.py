"""Shared 2-D ops: pure functions on channels-last tensors, one folder each; import as `visionbb.kernels`.

An op's paths agree: `reference` (the definition), `portable` (plain PyTorch, any device, exportable), `triton` (fused
GPU kernels; not yet for linear attention and the rotary embedding). `use(...)` chooses one for a block of code,
`VISIONBB_BACKEND` for a process.
"""
from ._dispatch import BACKENDS, has_triton, use
from ._flops import flop_formulas
from .linear_attention import linear_attention
from .neighborhood import merge_attentions, na2d, na2d_qkvpacked
from .rotary import Rotary, rotary2d

__all__ = [
    "BACKENDS", "Rotary", "flop_formulas", "has_triton", "linear_attention", "merge_attentions", "na2d",
    "na2d_qkvpacked", "rotary2d", "use",
]
