"""Neighborhood attention as a token mixer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from ..kernels import na2d_qkvpacked
from .dropout import Dropout
from .linear import Linear

PAD_MODES = ("natten14", "mask", "error")


def _pair(x: int | Sequence[int]) -> list[int]:
    return [x, x] if isinstance(x, int) else list(x)


@register_notrace_module  # pads by the size of the map
class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention with relative position bias, on (B, H, W, dim) of any H, W.

    Papers: NAT (arXiv 2204.07143), DiNAT (arXiv 2209.15001). The operator is `visionbb.kernels.na2d`.

    Args:
        num_heads: must divide dim.
        kernel_size, dilation, stride: int or (height, width).
        is_causal: queries see no key after themselves, along both axes; needs `rel_pos_bias=False`.
        window: "square" or "disc".
        rel_pos_bias: learned bias per head and offset, (num_heads, 2*kh - 1, 2*kw - 1).
        pad_mode: for maps smaller than kernel_size * dilation:
            "natten14": zero-pad the input at the right and bottom up to that size, unmasked, so that padded positions
            are keys that hold the qkv bias: what the published weights were trained and evaluated with;
            "mask": windows shrink to the map;
            "error": raise.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads, or an unknown pad_mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool = False,
        window: str = "square",
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        pad_mode: str = "natten14",
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        for name, value in (("kernel_size", kernel_size), ("dilation", dilation), ("stride", stride)):
            if min(_pair(value)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode must be one of {', '.join(PAD_MODES)}, got {pad_mode!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.kernel_size, self.dilation, self.stride = _pair(kernel_size), _pair(dilation), _pair(stride)
        self.is_causal = is_causal
        self.window = window
        self.pad_mode = pad_mode
        # Circular windows are cut off at the borders anyway: no map is too small for them.
        self.min_size = [1, 1] if window == "disc" else [
            k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)
        ]
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = None
        if rel_pos_bias:
            kh, kw = self.kernel_size
            self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kh - 1, 2 * kw - 1, **dd))
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"rpb"}

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3, heads, head_dim) to (B, H, W, heads, head_dim)."""
        clip = self.pad_mode == "mask"
        if torch.jit.is_scripting():
            causal = [int(self.is_causal), int(self.is_causal)]
            return torch.ops.visionbb.na2d_qkvpacked(
                qkv, self.rpb, self.kernel_size, self.dilation, self.stride, causal, self.window == "disc", clip,
                self.scale,
            )[0]
        else:
            return na2d_qkvpacked(
                qkv, self.kernel_size, self.dilation, self.stride,
                rpb=self.rpb, scale=self.scale, causal=self.is_causal, window=self.window, clip=clip,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, C = x.shape
        pad_h, pad_w = max(self.min_size[0] - H, 0), max(self.min_size[1] - W, 0)
        padded = self.pad_mode == "natten14" and pad_h + pad_w > 0
        if padded:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, C // self.num_heads))
        x = self.attend(qkv).flatten(-2)
        if padded:
            x = x[:, :H, :W]
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, pad_mode={self.pad_mode!r}"
