"""The models around the blocks: what is before and behind them in each family, and the pass that carries the state."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.models import Eva, VisionTransformer, checkpoint
from torch import nn

from .._timm_compat import feature_take_indices
from ..backbones import Columnar, TokenColumnar
from .blocks import BlockAdapter
from .context import BlockContext
from .method import Method
from .report import Reduction
from .schedule import Schedule, removed
from .state import TokenState

# ---- Families -------------------------------------------------------------------------------------------------------

class VitFamily:
    """timm's `VisionTransformer`: DeiT, DeiT III, CLIP, DINOv2, SigLIP and many more."""

    base: type[nn.Module] = VisionTransformer
    own = ("forward", "forward_features", "forward_intermediates")  # what a subclass must not change

    def refuses(self, model: nn.Module) -> str | None:
        """Why this model cannot be reduced, or None."""
        if changed := [name for name in self.own if getattr(type(model), name) is not getattr(self.base, name)]:
            return f"its {changed[0]} is not that of {self.base.__name__}"
        if getattr(model, "global_pool", "") == "prr":
            return "its head pools by 'prr' attention, which cannot weigh tokens by size"
        if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
            return "it drops patches at random in training (patch_drop_rate)"
        return None

    def embedding(self, model: nn.Module) -> nn.Module:
        return model.patch_embed

    def prefix(self, model: nn.Module) -> int:
        return model.num_prefix_tokens

    def has_class(self, model: nn.Module) -> bool:
        return model.cls_token is not None

    def grid(self, model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of images of this size."""
        return tuple(model.patch_embed.dynamic_feat_size(size))

    def embed(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
        """Images to the tokens in front of the first block, and each block's rotary embedding."""
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        return x, [None] * len(model.blocks)

    def pool_type(self, model: nn.Module) -> str:
        return model.global_pool

    def head(self, model: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Normed tokens at hand (B, P + n, C) to logits, as the tokens that were merged into them would give."""
        kind = self.pool_type(model)
        if kind == "":
            return model.forward_head(state.restore(x))
        if kind == "token" or state.size is None:
            return model.forward_head(x)
        return self.classify(model, self.pool(model, x, state))

    def classify(self, model: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def pool(self, model: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Tokens (B, P + n, C) to (B, C), each token as often as it is patches."""
        included = model.pool_include_prefix if isinstance(model, VisionTransformer) else model.attn_pool is not None
        size = state.size
        if included:
            size = torch.cat((size.new_ones(x.shape[0], state.prefix), size), 1)
        else:
            x = x[:, state.prefix :]
        if model.attn_pool is not None:
            return model.attn_pool(x, attn_mask=size.log().to(x.dtype)[:, None, None])
        return pool_by_size(x, size, self.pool_type(model))

    def features(self, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Restored tokens as `forward_features` of the model gives them."""
        return x


class EvaFamily(VitFamily):
    """timm's `Eva`: EVA-02, BEiT in this form, DINOv3, ViTs with rotary embeddings."""

    base = Eva

    def embed(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
        x, rope = model._pos_embed(model.patch_embed(images))
        depth = len(model.blocks)
        return model.norm_pre(x), [rope[i] for i in range(depth)] if model.rope_mixed else [rope] * depth


class TokenColumnFamily(VitFamily):
    """Our columns with a class token."""

    base = TokenColumnar
    own = (*VitFamily.own, "forward_units", "forward_head")

    def refuses(self, model: nn.Module) -> str | None:
        return "its class token stands amid the patches" if model.stem.middle else super().refuses(model)

    def embedding(self, model: nn.Module) -> nn.Module:
        return model.stem

    def prefix(self, model: nn.Module) -> int:
        return 1

    def has_class(self, model: nn.Module) -> bool:
        return True

    def grid(self, model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
        conv = model.stem.patch_embed.proj
        return tuple(  # padded to whole patches, which may overlap
            (-(-side // patch) * patch - patch) // stride + 1
            for side, patch, stride in zip(size, conv.kernel_size, conv.stride, strict=True)
        )

    def embed(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
        return model.stem(images)[0], [None] * len(model.blocks)

    def pool_type(self, model: nn.Module) -> str:
        return model.head.pool_type

    def classify(self, model: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
        return model.head.fc(model.head.drop(pooled))

    def pool(self, model: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        return pool_by_size(x[:, state.prefix :], state.size, self.pool_type(model))


class ColumnFamily(VitFamily):
    """Our columns without a class token, of maps (B, H, W, C)."""

    base = Columnar
    own = TokenColumnFamily.own

    def embedding(self, model: nn.Module) -> nn.Module:
        return model.stem

    def prefix(self, model: nn.Module) -> int:
        return 0

    def has_class(self, model: nn.Module) -> bool:
        return False

    def grid(self, model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
        stride = model.feature_info[0]["reduction"]
        return tuple(-(-side // stride) for side in size)

    def embed(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
        return model.forward_stem(images).flatten(1, 2), [None] * len(model.blocks)

    def pool_type(self, model: nn.Module) -> str:
        return ""  # its head reads maps

    def head(self, model: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        return model.forward_head(self.features(state.restore(x), state))

    def features(self, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        return x.unflatten(1, state.grid)


FAMILIES = (VitFamily(), EvaFamily(), TokenColumnFamily(), ColumnFamily())  # a subclass before its base


def family_for(model: nn.Module) -> VitFamily:
    """The family of a model.

    Raises:
        TypeError: no family knows it; the message says why.
    """
    for family in FAMILIES:
        if isinstance(model, family.base):
            if reason := family.refuses(model):
                raise TypeError(f"{type(model).__name__} cannot be reduced: {reason}")
            return family
    known = ", ".join(family.base.__name__ for family in FAMILIES)
    raise TypeError(f"model must be of one of the families {known}, got {type(model).__name__}")


def pool_by_size(x: torch.Tensor, size: torch.Tensor, kind: str) -> torch.Tensor:
    """Tokens (B, n, C) of sizes (B, n) to (B, C): "avg", "max" or "avgmax" of the patches in them."""
    size = size[..., None]
    mean = ((x * size).sum(1) / size.sum(1)).to(x.dtype)
    if kind == "avg":
        return mean
    largest = x.masked_fill(size == 0, float("-inf")).amax(1)
    return largest if kind == "max" else 0.5 * (largest + mean)


# ---- The pass -------------------------------------------------------------------------------------------------------

class Reducer(nn.Module):
    """All that a reduced model has beside its own parts: what reduces, how much, and what it must know of the model."""

    def __init__(self, method: Method, schedule: Schedule, family: VitFamily, adapter: BlockAdapter):
        super().__init__()
        self.method = method
        self.schedule = schedule
        self.family = family
        self.adapter = adapter

    def step(
        self, model: nn.Module, index: int, x: torch.Tensor, rope: torch.Tensor | None, *state
    ) -> tuple[torch.Tensor, TokenState]:
        """One block: tokens (B, P + n, C) to (B, P + n', C)."""
        method, adapter, block = self.method, self.adapter, model.blocks[index]
        ctx = self.context(model, index, x, rope, TokenState(*state))
        if method.where == "start" and (step := self.reduce(ctx)) is not None:
            ctx = self.context(model, index, step[0], rope, step[1])
        ctx.out = method.attend(ctx)
        branch = adapter.branch(block, ctx.normed, ctx.out)
        ctx.tokens = adapter.add_attention(block, ctx.tokens, branch)
        if method.where == "mid" and (step := self.reduce(ctx)) is not None:
            return adapter.add_mlp(block, step[0]), step[1]
        ctx.tokens = adapter.add_mlp(block, ctx.tokens)
        if method.where == "end" and (step := self.reduce(ctx)) is not None:
            return step
        return ctx.tokens, ctx.state

    def context(
        self, model: nn.Module, index: int, x: torch.Tensor, rope: torch.Tensor | None, state: TokenState
    ) -> BlockContext:
        bias = None if state.size is None else self.method.key_bias(state.size)
        if bias is not None:
            bias = F.pad(bias, (state.prefix, 0)).to(x.dtype)
        has_class = self.family.has_class(model)
        return BlockContext(
            self.adapter, model.blocks[index], index, len(model.blocks), has_class, x, state, rope, bias
        )

    def reduce(self, ctx: BlockContext) -> tuple[torch.Tensor, TokenState] | None:
        """The context's tokens and state with fewer tokens, or None where all stay."""
        method = self.method
        remove = 0
        if method.adaptive:
            if ctx.index not in method.blocks(ctx.depth):
                return None
        else:
            remove = removed(self.schedule[ctx.index], ctx.n, method.limit(ctx.n))
            if remove == 0:
                return None
        step = method.reduce(ctx, remove)
        if step is None:
            return None
        assignment, tokens, size = step
        return tokens, ctx.state.after(assignment, ctx.x, size)


class Reduced:
    """What a reduced model does in its own way; mixed into its class by `reduced_class`.

    Forward hooks of the blocks do not run: it is their parts that are called, in halves.
    """

    plain_class: type[nn.Module]
    reducer: Reducer

    def __reduce_ex__(self, protocol):
        return _empty, (self.plain_class,), *super().__reduce_ex__(protocol)[2:]

    @property
    def reduction(self) -> Reduction:
        """How this model is reduced, and what that does to given images."""
        return Reduction(self)

    def forward_tokens(
        self, images: torch.Tensor, track: bool = True, blocks: int | None = None, take: Sequence[int] = ()
    ) -> tuple[torch.Tensor, TokenState, list[tuple[torch.Tensor, TokenState]]]:
        """Images to the tokens that are left behind the last block, before the final norm.

        Args:
            track: keep account of which token each patch is in, as everything but a class token's head needs it.
            blocks: how many to run; None for all.
            take: blocks behind which tokens and state are noted.

        Returns:
            Tokens (B, P + n, C), their `TokenState`, and the list of those noted.
        """
        family = self.reducer.family
        x, ropes = family.embed(self, images)
        state = TokenState.start(x, family.prefix(self), family.grid(self, tuple(images.shape[-2:])), track)
        noted = []
        for i, rope in enumerate(ropes[:blocks]):
            if self.grad_checkpointing:
                x, state = checkpoint(self.reducer.step, self, i, x, rope, *state)
            else:
                x, state = self.reducer.step(self, i, x, rope, *state)
            if i in take:
                noted.append((x, state))
        return x, state, noted

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Features as those of the plain model, every patch as the token it is in, or as it was last."""
        _no_mask(attn_mask, is_causal)
        x, state, _ = self.forward_tokens(x)
        return self.reducer.family.features(self.norm(state.restore(x)), state)

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        _no_mask(attn_mask, is_causal)
        return self.forward_with_state(x)[0]

    def forward_with_state(self, images: torch.Tensor) -> tuple[torch.Tensor, TokenState]:
        """What `forward` gives, and the `TokenState` behind the last block: for losses that read a method's record."""
        family = self.reducer.family
        x, state, _ = self.forward_tokens(images, track=family.pool_type(self) == "")
        return family.head(self, self.norm(x), state), state

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ):
        """As in the plain model; maps are whole, every patch as the token it is in, or as it was last."""
        _no_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        family = self.reducer.family
        take, last = feature_take_indices(len(self.blocks), indices)
        blocks = last + 1 if stop_early else len(self.blocks)
        x, state, noted = self.forward_tokens(x, blocks=blocks, take=take)
        maps, prefixes = [], []
        for tokens, at in noted:
            tokens = at.restore(tokens)
            tokens = self.norm(tokens) if norm else tokens
            prefixes.append(tokens[:, : at.prefix])
            patches = tokens[:, at.prefix :]
            if output_fmt != "NLC":
                patches = patches.unflatten(1, at.grid)
            maps.append(patches.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else patches)
        return_prefix_tokens = return_prefix_tokens and state.prefix > 0
        if output_dict:
            out = {"image_intermediates": maps}
            if return_prefix_tokens:
                out["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                out["image_features"] = self.norm(state.restore(x))
            return out
        if return_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))
        if intermediates_only:
            return maps
        x = state.restore(x)
        unfinished = isinstance(self, Columnar) and blocks < len(self.blocks)  # as its own forward_intermediates has it
        return family.features(x if unfinished else self.norm(x), state), maps


def _no_mask(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a reduced model takes no attn_mask and no is_causal: its tokens are not those of the mask")


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def reduced_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of reduced models of a class."""
    if cls not in _classes:
        body = {"plain_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _classes[cls] = type(f"Reduced{cls.__name__}", (Reduced, cls), body)
    return _classes[cls]


def _empty(cls: type[nn.Module]) -> nn.Module:
    """A reduced model without its contents, for unpickling."""
    reduced = reduced_class(cls)
    return reduced.__new__(reduced)
