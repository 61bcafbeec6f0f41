"""Small networks of every family that reduction knows, with weights that make no part of them trivial."""
import pytest
import torch
from timm.models import Eva, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from visionbb.backbones import Block, Columnar, PatchConv, PositionEmbed
from visionbb.mixers import SoftmaxAttention
from visionbb.models.drop_ins import DropIn

SIZES = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7)  # 64 patches
ROPE = dict(use_rot_pos_emb=True, **SIZES)


class _Stem(PatchConv):
    def __init__(self):
        super().__init__(3, 48, 8)

    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1)


def column():
    return Columnar(
        stem=_Stem(), block=lambda i, dim, drop: Block(dim, SoftmaxAttention(dim, 3), drop_path=drop),
        norm=nn.LayerNorm(48), embed_dim=48, depth=4, in_chans=3, num_classes=7, global_pool="avg", drop_rate=0.0,
        drop_path_rate=0.0, stem_stride=8, pos_embed=PositionEmbed(48, (8, 8)),
    )


FAMILIES = {
    "deit": lambda: VisionTransformer(**SIZES),
    "distilled": lambda: VisionTransformerDistilled(**SIZES),
    "deit3": lambda: VisionTransformer(**SIZES, init_values=0.1, no_embed_class=True),
    "clip": lambda: VisionTransformer(**SIZES, pre_norm=True),
    "dinov2": lambda: VisionTransformer(**SIZES, init_values=0.1, reg_tokens=4, no_embed_class=True),
    "qk_norm": lambda: VisionTransformer(**SIZES, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "average": lambda: VisionTransformer(**SIZES, global_pool="avg", class_token=False),
    "average_max": lambda: VisionTransformer(**SIZES, global_pool="avgmax"),
    "siglip": lambda: VisionTransformer(**SIZES, global_pool="map", class_token=False),
    "eva02": lambda: Eva(**ROPE, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "beit": lambda: Eva(**SIZES, init_values=0.1),
    "dinov3": lambda: Eva(
        **ROPE, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4, use_abs_pos_emb=False, init_values=0.1,
        global_pool="token",
    ),
    "rope_mixed": lambda: Eva(**ROPE, rope_type="mixed"),
    "rope_grouped": lambda: Eva(**ROPE, attn_type="rope", qkv_fused=False, num_kv_heads=1, global_pool="map"),
    "drop_in": lambda: DropIn(mixer="softmax", **SIZES),
    "drop_in_average": lambda: DropIn(mixer="softmax", global_pool="avg", **SIZES),
    "column": column,
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for name, p in model.named_parameters():
        if "rope" not in name:
            nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.eval()


def each_alone(model: nn.Module, images: torch.Tensor) -> None:
    """Checks that every image (float64) of a batch gives what it gives alone."""
    outputs = model(images), model.forward_features(images)
    assert outputs[1].isfinite().all()
    for i in range(len(images)):
        one = images[i : i + 1]
        alone = model(one), model.forward_features(one)
        torch.testing.assert_close(alone, tuple(x[i : i + 1] for x in outputs), rtol=1e-5, atol=1e-7)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
