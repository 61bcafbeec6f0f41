"""The ViT-shaped skeleton: one map of tokens through a column of equal blocks."""

from collections.abc import Callable

import torch
from timm.layers import resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from torch import nn

from .backbone import Backbone, drop_path_rates


class Columnar(Backbone):
    """stem -> blocks -> norm -> head; tokens keep their map, (B, H, W, embed_dim), throughout.

    Args:
        stem: images (B, in_chans, H, W) to tokens (B, H / stem_stride, W / stem_stride, embed_dim).
        block: (index, dim, drop_path) -> module on (B, H, W, dim).
        norm: final norm over embed_dim.
        head: as in `Pyramid`.
        depth: number of blocks.
        pos_embed_size: (rows, columns) of a learned absolute position embedding, resampled to any other map;
            None for none.
        The rest is as in `Pyramid`.
    """

    units = "blocks"

    def __init__(
        self,
        *,
        stem: nn.Module,
        block: Callable[[int, int, float], nn.Module],
        norm: nn.Module,
        embed_dim: int,
        depth: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        head: nn.Module | None = None,
        stem_stride: int = 16,
        pos_embed_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_chans, num_classes)
        self.grad_checkpointing = False
        self.stem = stem
        self.pos_embed = None
        if pos_embed_size is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, *pos_embed_size, embed_dim, device=device, dtype=dtype))
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.Sequential(*(block(i, embed_dim, rate) for i, rate in enumerate(rates)))
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=stem_stride, module=f"blocks.{i}") for i in range(depth)
        ]
        self.norm = norm
        self.add_head(embed_dim, global_pool, drop_rate, head, device=device, dtype=dtype)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^stem|^pos_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _norm_fits(self, index: int) -> bool:
        return True

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(self.pos_embed, x.shape[1:3])
        return x

    def forward_unit(self, unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(unit, x) if self.grad_checkpointing else unit(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) to normed tokens (B, H / stem_stride, W / stem_stride, num_features)."""
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)
