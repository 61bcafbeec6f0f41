"""The blocks of a ViT in halves, as reduction needs them: an adapter for each family of blocks.

Each repeats what its block's `forward` does, op by op, so that nothing changes where no tokens go: with the residual
connections, LayerScale, the norms of queries and keys, rotary embeddings, gates. What it does not know it refuses.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as VitBlock
from torch import nn

from ..backbones import Block, TokenBlock
from ..backbones.block import ConvMlp
from ..mixers import SoftmaxAttention

ALL, QUERIES_AND_KEYS, VALUES = slice(3), slice(2), slice(2, 3)  # of q, k, v


class BlockAdapter:
    """A pre-norm block of timm's `VisionTransformer`: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    Tensors are sequences (B, P + n, C), P prefix tokens first; q, k, v and what attention gives (B, heads, P + n, d).
    """

    def refuses(self, block: nn.Module) -> str | None:
        """Why this block cannot be reduced, or None."""
        if type(block.attn) is not Attention:
            return f"its attention is {type(block.attn).__name__}, only timm's Attention is known"
        return None

    def attention(self, block: nn.Module) -> nn.Module:
        return block.attn

    def norm(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads."""
        return block.norm1(x)

    def project(self, block: nn.Module, x: torch.Tensor, parts: slice = ALL) -> tuple[torch.Tensor, ...]:
        """Normed tokens to q, k, v, or some of them, before any rotary embedding."""
        attn = block.attn
        return self.in_heads(attn, project_parts(attn.qkv, x, parts), parts)

    def in_heads(self, attn: nn.Module, qkv: torch.Tensor, parts: slice) -> tuple[torch.Tensor, ...]:
        """Of projections side by side, (B, P + n, parts * heads * d), each by heads and under its norm."""
        norms = (attn.q_norm, attn.k_norm, nn.Identity())[parts]
        each = qkv.unflatten(-1, (len(norms), attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(norm(part) for norm, part in zip(norms, each, strict=True))

    def turn(self, block: nn.Module, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """q or k under the rotary embedding of its tokens."""
        raise NotImplementedError

    def attend(
        self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None
    ) -> torch.Tensor:
        """softmax(scale * q k^T + key_bias) v, key_bias (B, P + n) of q's dtype."""
        attn = block.attn
        mask = None if key_bias is None else key_bias[:, None, None]
        if attn.fused_attn:
            dropout = attn.attn_drop.p if attn.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        return attn.attn_drop((scores if mask is None else scores + mask).softmax(-1)) @ v

    def branch(self, block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What `attend` gave, as the residual branch adds it; x are the normed tokens."""
        attn = block.attn
        gate = attn.gate(x).sigmoid() if attn.gate is not None else None
        y = attn.norm(y.transpose(1, 2).flatten(2))
        return attn.proj_drop(attn.proj(y if gate is None else y * gate))

    def add_attention(self, block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + block.drop_path1(block.ls1(y))

    def add_mlp(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class EvaAdapter(BlockAdapter):
    """A pre-norm block of timm's `Eva`: DINOv3, EVA-02, BEiT and ViTs with rotary embeddings among others."""

    def refuses(self, block: nn.Module) -> str | None:
        if type(block.attn) not in (EvaAttention, AttentionRope):
            return f"its attention is {type(block.attn).__name__}, only EvaAttention and AttentionRope are known"
        return None

    def project(self, block: nn.Module, x: torch.Tensor, parts: slice = ALL) -> tuple[torch.Tensor, ...]:
        attn = block.attn
        if attn.qkv is None:
            layers = (attn.q_proj, attn.q_norm), (attn.k_proj, attn.k_norm), (attn.v_proj, nn.Identity())
            return tuple(
                norm(proj(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)) for proj, norm in layers[parts]
            )
        bias = None
        if type(attn) is not AttentionRope and attn.q_bias is not None:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)[parts])
            if attn.qkv_bias_separate:
                return self.in_heads(attn, project_parts(attn.qkv, x, parts) + bias, parts)
        return self.in_heads(attn, project_parts(attn.qkv, x, parts, bias), parts)

    def turn(self, block: nn.Module, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        prefix = block.attn.num_prefix_tokens
        patches = apply_rot_embed_cat(x[:, :, prefix:], rope, half=block.attn.rotate_half)
        return torch.cat((x[:, :, :prefix], patches), 2).type_as(x)

    def attend(
        self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return super().attend(block, q, k, v, key_bias)

    def add_attention(self, block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)

    def add_mlp(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = block.mlp(block.norm2(x))
        return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


class MixerAdapter(BlockAdapter):
    """A block of our columns whose mixer is plain softmax attention."""

    def refuses(self, block: nn.Module) -> str | None:
        mixer = block.mixer
        if type(mixer) is not SoftmaxAttention:
            return (
                f"its mixer is {type(mixer).__name__}; merged tokens are weighed in a softmax, which only"
                " SoftmaxAttention has"
            )
        plain = mixer.projections == ("q", "k", "v") and not mixer.rotary_span
        if not plain or mixer.local is not None or mixer.norm is not None:
            return "its attention has a gate, a norm, a rotary embedding or a local convolution, which need the map"
        positional = (block.cpe1, block.cpe2)
        if not all(isinstance(cpe, nn.Identity) for cpe in positional) or isinstance(block.mlp, ConvMlp):
            return "it has positional convolutions, which need the map"
        return None

    def attention(self, block: nn.Module) -> nn.Module:
        return block.mixer

    def project(self, block: nn.Module, x: torch.Tensor, parts: slice = ALL) -> tuple[torch.Tensor, ...]:
        each = project_parts(block.mixer.qkv, x, parts).chunk(parts.stop - (parts.start or 0), -1)
        return tuple(block.mixer.heads(part).transpose(1, 2) for part in each)

    def attend(
        self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None
    ) -> torch.Tensor:
        mask = None if key_bias is None else key_bias[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def branch(self, block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return block.mixer.proj_drop(block.mixer.proj(y.transpose(1, 2).flatten(2)))

    def add_attention(self, block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return block.ls1(x, block.drop_path1(y))

    def add_mlp(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block.ls2(x, block.drop_path2(block.mlp(block.norm2(x))))


def project_parts(layer: nn.Module, x: torch.Tensor, parts: slice, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Those `parts` of what a linear layer gives that makes q, k and v side by side.

    Args:
        bias: of those parts; None for the layer's own.
    """
    if bias is None and parts == ALL:
        return layer(x)
    width = layer.out_features // 3
    rows = slice(width * (parts.start or 0), width * parts.stop)
    if bias is None and type(layer) is not nn.Linear:  # with something around it, or quantised: as a whole
        return layer(x)[..., rows]
    if bias is None and layer.bias is not None:
        bias = layer.bias[rows]
    return F.linear(x, layer.weight[rows], bias)


ADAPTERS = {VitBlock: BlockAdapter(), EvaBlock: EvaAdapter(), TokenBlock: MixerAdapter(), Block: MixerAdapter()}


def adapter_for(blocks: nn.Module) -> BlockAdapter:
    """The adapter of a model's blocks.

    Raises:
        TypeError: a block that no adapter knows; the message says which and why.
    """
    for i, block in enumerate(blocks):
        adapter = ADAPTERS.get(type(block))
        if adapter is None or type(block) is not type(blocks[0]):
            known = ", ".join(f"{cls.__module__}.{cls.__name__}" for cls in ADAPTERS)
            raise TypeError(
                f"block {i} is {type(block).__module__}.{type(block).__name__}; all blocks must be of one of: {known}"
            )
        if reason := adapter.refuses(block):
            raise TypeError(f"block {i} cannot be reduced: {reason}")
    return adapter
