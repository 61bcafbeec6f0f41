"""Tokens that are gone in evaluation and only masked in training, so that gradients reach the choice of them.

The mechanism of DynamicViT (arXiv 2106.02034, section 3.3), which AS-ViT shares.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .context import BlockContext
from .method import Method


class Masking(Method):
    """A method whose `reduce` removes tokens in evaluation, and in training calls `mask` instead and returns None.

    Masked tokens get no attention but their own, and none of the head's average. The masks (B, n) of all steps so far
    are the state's record, which losses read.
    """

    def key_bias(self, size: torch.Tensor) -> torch.Tensor | None:
        return None if self.training else super().key_bias(size)  # in training `attend` masks

    def attend(self, ctx: BlockContext) -> torch.Tensor:
        if not ctx.state.record:
            return ctx.attend()
        gate = F.pad(ctx.state.record[-1], (ctx.state.prefix, 0), value=1.0)[:, None, None]
        own = torch.eye(gate.shape[-1], dtype=torch.bool, device=gate.device)
        attention = ctx.attention() * torch.where(own, 1, gate)
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-6)
        return ctx.apply(attention)

    def mask(self, ctx: BlockContext, stays: torch.Tensor, soft: torch.Tensor) -> None:
        """Goes on with the tokens marked (B, n), the others masked; gradients go to `soft` (B, n): straight through."""
        mask = stays.to(soft.dtype) + soft - soft.detach()
        ctx.state = ctx.state._replace(size=mask.detach(), record=(*ctx.state.record, mask))  # the size is for the head
