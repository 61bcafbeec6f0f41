"""The ViT-shaped skeleton: one map of tokens through a column of equal blocks."""

from collections.abc import Callable, Sequence

import torch
from timm.layers import PatchEmbed, get_device_dtype, resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models.vision_transformer import global_pool_nlc
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


class TokenColumnar(Columnar):
    """A column with a class token, as ViT has it: blocks are `TokenBlock`s on sequences (B, 1 + H * W, embed_dim).

    `forward_features` returns such a sequence; intermediates are maps, without the class token. Arguments are those of
    `Columnar`, with a `ClassTokenStem` and, by default, a `TokenHead`.
    """

    output_fmt = "NLC"

    def __init__(
        self,
        *,
        stem: "ClassTokenStem",
        block: Callable[[int, int, float], nn.Module],
        norm: nn.Module,
        embed_dim: int,
        depth: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        stem_stride: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__(
            stem=stem, block=block, norm=norm, embed_dim=embed_dim, depth=depth, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
            head=TokenHead(embed_dim, num_classes, global_pool, drop_rate, device=device, dtype=dtype),
            stem_stride=stem_stride, device=device, dtype=dtype,
        )
        self.blocks = nn.ModuleList(self.blocks)  # a Sequential passes one argument on, these take three

    def bare_head(self) -> nn.Module:
        return TokenHead(self.num_features, 0, "", **get_device_dtype(self))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) to normed tokens (B, 1 + H / stem_stride * W / stem_stride, num_features)."""
        x, H, W = self.stem(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, H, W)
            else:
                x = block(x, H, W)
        return self.norm(x)

    def forward_units(
        self, x: torch.Tensor, units: nn.Module, take: Sequence[int], norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, H, W = self.stem(x)
        taken = []
        for i, block in enumerate(units):
            x = checkpoint(block, x, H, W) if self.grad_checkpointing else block(x, H, W)
            if i in take:
                taken.append((self.norm(x) if norm else x)[:, 1:].unflatten(1, (H, W)))
        return x, taken


class ClassTokenStem(nn.Module):
    """Patches as tokens behind a class token: images (B, in_chans, H, W) to ((B, 1 + h * w, embed_dim), h, w).

    Images are zero-padded at the right and bottom to whole patches.

    Args:
        grid_size: (rows, columns) that the position embedding is learned at; other maps get it resampled (bicubic).
    """

    def __init__(
        self, patch_size: int, in_chans: int, embed_dim: int, grid_size: tuple[int, int], device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True, **dd
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, *grid_size, embed_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.cls_token, std=1e-6)
        trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        x = self.patch_embed(x)
        B, H, W, _ = x.shape
        x = x + resample_abs_pos_embed_nhwc(self.pos_embed, (H, W))
        return torch.cat((self.cls_token.expand(B, -1, -1), x.flatten(1, 2)), 1), H, W


class TokenHead(nn.Module):
    """Pool, dropout and classifier of tokens (B, 1 + N, in_features), with the methods of timm's classifier heads.

    Args:
        pool_type: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for none.

    Raises:
        AssertionError: another pool_type, as in timm.
    """

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "token", drop_rate: float = 0.0, device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = self.num_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, in_features: int | None = None, **dd) -> None:
        if pool_type is not None:
            if pool_type not in ("token", "avg", "max", "avgmax", ""):
                raise AssertionError(f"global_pool must be token, avg, max, avgmax or '', got {pool_type!r}")
            self.pool_type = pool_type
        self.fc = nn.Linear(self.in_features, num_classes, **dd) if num_classes else nn.Identity()
        self.fc.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(global_pool_nlc(x, self.pool_type, num_prefix_tokens=1))
        return x if pre_logits else self.fc(x)
