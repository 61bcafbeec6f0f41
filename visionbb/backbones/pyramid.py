"""The four-stage skeleton: every stage halves the map and is a run of equal blocks."""

from collections.abc import Callable, Sequence

import torch
from timm.models import checkpoint_seq
from torch import nn

from .backbone import Backbone, drop_path_rates


class Stage(nn.Module):
    """downsample, then blocks, on (B, H, W, C)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        return self.run_blocks(x)

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Pyramid(Backbone):
    """stem -> stages -> norm -> head, at strides 4, 8, 16, 32 (or from `stem_stride` on).

    Args:
        stem: images (B, in_chans, H, W) to tokens (B, H / stem_stride, W / stem_stride, dims[0]).
        downsample: (in_dim, out_dim) -> module that halves the map, at the start of every stage but the first.
        block: (stage, index, dim, drop_path) -> module on (B, H, W, dim).
        stage: (stage, downsample, blocks) -> `Stage`, of a family's own if its blocks run on something else than the
            map (windows of it); default: `Stage`.
        norm: final norm over dims[-1].
        head: module with `num_features`, `fc` and `reset` as timm's classifier heads have; default: pool, linear.
        dims, depths: width and number of blocks of each stage.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        num_features: width after the last stage, where its last block changes it; default: dims[-1].
    """

    units = "stages"

    def __init__(
        self,
        *,
        stem: nn.Module,
        downsample: Callable[[int, int], nn.Module],
        block: Callable[[int, int, int, float], nn.Module],
        norm: nn.Module,
        dims: Sequence[int],
        depths: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        stage: Callable[[int, nn.Module, Sequence[nn.Module]], Stage] | None = None,
        head: nn.Module | None = None,
        num_features: int | None = None,
        stem_stride: int = 4,
        device=None,
        dtype=None,
    ):
        super().__init__(in_chans, num_classes)
        if len(dims) != len(depths):
            raise ValueError(f"dims and depths must have one entry a stage, got {tuple(dims)} and {tuple(depths)}")
        self.stem = stem
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            blocks = [block(i, j, dim, rate) for j, rate in enumerate(rates)]
            down = downsample(dims[i - 1], dim) if i else nn.Identity()
            self.stages.append(Stage(down, blocks) if stage is None else stage(i, down, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}"))
        if num_features is not None:
            self.feature_info[-1]["num_chs"] = num_features
        self.norm = norm
        self.add_head(num_features or dims[-1], global_pool, drop_rate, head, device=device, dtype=dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def _norm_fits(self, index: int) -> bool:
        return index == len(self.feature_info) - 1

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) to normed tokens (B, H / 32, W / 32, num_features)."""
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)
