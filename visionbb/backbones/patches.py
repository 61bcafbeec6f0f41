"""Parts of stems and downsampling layers: patches of any image, and learned positions of any map."""

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc, trunc_normal_
from torch import nn

from ..mixers.window import pad_map


class PatchConv(nn.Conv2d):
    """Convolution of patches side by side, (B, in_dim, H, W) to (B, dim, ceil(H / size), ceil(W / size)).

    Maps are zero-padded at the right and bottom to whole patches.
    """

    def __init__(self, in_dim: int, dim: int, size: int, device=None, dtype=None):
        super().__init__(in_dim, dim, size, size, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_map(x.permute(0, 2, 3, 1), self.stride[0], self.stride[1]).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class PositionEmbed(nn.Module):
    """x + a learned absolute position embedding, on (B, H, W, dim) of any H, W.

    Args:
        size: (rows, columns) of the map the embedding is learned at; other maps get it resampled.
        interpolation: "bicubic" or "bilinear".
        antialias: whether resampling averages where a map is smaller, as timm does.
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        interpolation: str = "bicubic",
        antialias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.interpolation = interpolation
        self.antialias = antialias
        self.weight = nn.Parameter(torch.empty(1, *size, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"weight"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = [x.shape[1], x.shape[2]]
        return x + resample_abs_pos_embed_nhwc(self.weight, size, self.interpolation, self.antialias)

    def resampled(self, learned: torch.Tensor) -> torch.Tensor:
        """The embedding of a checkpoint at this one's size: (1, rows, columns, dim), or flat (1, N, dim).

        A flat one is taken to be of this size if it has as many tokens, else of a square map.
        """
        rows, cols = self.weight.shape[1:3]
        if learned.ndim == 3:
            side = round(learned.shape[1] ** 0.5)
            learned = learned.unflatten(1, (rows, cols) if learned.shape[1] == rows * cols else (side, side))
        return resample_abs_pos_embed_nhwc(learned, [rows, cols], self.interpolation, self.antialias)
