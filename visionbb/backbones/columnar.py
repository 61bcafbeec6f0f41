"""The ViT-shaped skeleton: one map of tokens through a column of equal blocks."""

import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import PatchEmbed, get_device_dtype, resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models.vision_transformer import global_pool_nlc
from torch import nn

from ..mixers.dropout import Dropout
from .backbone import Backbone, drop_path_rates


class Columnar(Backbone):
    """stem -> blocks -> norm -> head; tokens keep their map, (B, H, W, embed_dim), throughout.

    Args:
        stem: images (B, in_chans, H, W) to tokens (B, H / stem_stride, W / stem_stride, embed_dim).
        block: (index, dim, drop_path) -> module on (B, H, W, dim).
        norm: final norm over embed_dim.
        head: as in `Pyramid`.
        depth: number of blocks.
        pos_embed: module that adds positions to the stem's tokens, such as `PositionEmbed`; None for none.
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
        pos_embed: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_chans, num_classes)
        self.grad_checkpointing = False
        self.stem = stem
        self.pos_embed = pos_embed or nn.Identity()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.Sequential(*(block(i, embed_dim, rate) for i, rate in enumerate(rates)))
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=stem_stride, module=f"blocks.{i}") for i in range(depth)
        ]
        self.norm = norm
        self.add_head(embed_dim, global_pool, drop_rate, head, device=device, dtype=dtype)

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
        return self.pos_embed(x)

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

    `forward_features` returns such a sequence, its class token in front wherever the blocks have it; intermediates are
    maps, without the class token. Arguments are those of `Columnar`, with a `ClassTokenStem` and, by default, a
    `TokenHead`.
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
        return self.norm(self.stem.class_first(x))

    def forward_units(
        self, x: torch.Tensor, units: nn.Module, take: Sequence[int], norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, H, W = self.stem(x)
        taken = []
        for i, block in enumerate(units):
            x = checkpoint(block, x, H, W) if self.grad_checkpointing else block(x, H, W)
            if i in take:
                patches = self.stem.class_first(x)[:, 1:].unflatten(1, (H, W))
                # The stream between blocks may be wider than the parameters.
                taken.append(self.norm(patches) if norm else patches.to(self.stem.cls_token.dtype))
        return self.stem.class_first(x), taken


class ClassTokenStem(nn.Module):
    """Patches as tokens with a class token: images (B, in_chans, H, W) to ((B, 1 + h * w, embed_dim), h, w).

    Images are zero-padded at the right and bottom to multiples of the patch.

    Args:
        grid_size: (rows, columns) that the position embedding is learned at; other maps get it resampled (bicubic).
        stride: pixels from one patch to the next, a divisor of patch_size; default: patch_size.
        middle: the class token stands behind h * w // 2 of the patches, for scans from both ends (Vim); otherwise in
            front of them.
        antialias: where the position embedding is resampled.

    Raises:
        ValueError: a stride that does not divide patch_size.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        grid_size: tuple[int, int],
        stride: int | None = None,
        middle: bool = False,
        antialias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        stride = patch_size if stride is None else stride
        if patch_size % stride:
            raise ValueError(f"stride must divide patch_size = {patch_size}, got {stride}")
        self.middle = middle
        self.antialias = antialias
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True, **dd
        )
        self.patch_embed.proj.stride = (stride, stride)
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
        x = (x + resample_abs_pos_embed_nhwc(self.pos_embed, (H, W), antialias=self.antialias)).flatten(1, 2)
        before = H * W // 2 if self.middle else 0
        return torch.cat((x[:, :before], self.cls_token.expand(B, -1, -1), x[:, before:]), 1), H, W

    def class_first(self, x: torch.Tensor) -> torch.Tensor:
        """A sequence as the blocks have it, (B, 1 + h * w, embed_dim), with its class token in front."""
        if not self.middle:
            return x
        before = (x.shape[1] - 1) // 2
        return torch.cat((x[:, before : before + 1], x[:, :before], x[:, before + 1 :]), 1)


def fold_class_position(
    cls_token: torch.Tensor, pos_embed: torch.Tensor, middle: bool = False
) -> dict[str, torch.Tensor]:
    """A class token (1, 1, C) and the positions of all tokens (1, 1 + N, C), as `ClassTokenStem` has them.

    Raises:
        ValueError: the positions are not those of a class token and a square map.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if 1 + side**2 != pos_embed.shape[1]:
        raise ValueError(
            f"pos_embed must hold a class token and a square map of patches, got {pos_embed.shape[1]} positions"
        )
    before = side**2 // 2 if middle else 0
    front, cls_pos, back = pos_embed.split((before, 1, side**2 - before), 1)
    pos = torch.cat((front, back), 1).unflatten(1, (side, side))
    return {"stem.cls_token": cls_token + cls_pos, "stem.pos_embed": pos}


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
        self.drop = Dropout(drop_rate)
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
