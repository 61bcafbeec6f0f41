"""LocalVMamba: VMamba's first release, whose layers each walk the map along routes of their own, windows among them.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan, https://arxiv.org/abs/2403.09338
Authors' code and weights: https://github.com/hunto/LocalMamba (Apache-2.0)

In a row-major walk, a token and the one below it are a whole row apart. LocalMamba walks window after window, so that
neighbours meet soon, and lets training choose: of eight routes (rows, columns, windows of 2 and of 7 a side, from
either end) a search keeps the best four for each layer. A gate on the channels of each route's result, by the mean of
its tokens, stands before their sum.

Differences to the authors' code: downsampling stands at the start of a stage; the stem pads images to whole patches,
where theirs cuts off what is left; columns are right for maps that are not square, too.
"""
from collections.abc import Sequence
from functools import partial

from timm.layers import LayerNorm
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ..backbones import MixerBlock, Pyramid
from ..mixers import SS2D
from ._registry import create_from, imagenet_cfg, register_variants
from .vmamba import PatchStem
from .vmamba import checkpoint_filter_fn as vmamba_filter_fn

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints, those of VMamba's first release and the gates', to ours."""
    gate = {".multi_scan.attn.": ".attn.", ".global_reduce.": ".fc1.", ".channel_select.": ".fc2."}
    out = {}
    for key, value in vmamba_filter_fn(state_dict, model).items():
        for name, ours in gate.items():
            key = key.replace(name, ours)
        out[key] = value
    return out


class LocalVMamba(Pyramid):
    """LocalVMamba.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths: per stage.
        routes: per stage, a list with the routes of each block, in the words of `visionbb.kernels.scan_routes`; shorter
            lists repeat.
        d_state: numbers the state of a channel is made of.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout after the scans.

    Raises:
        ValueError: routes has not one list a stage, or an empty one.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        routes: Sequence[Sequence[Sequence[str]]] = ((("row", "column", "window2", "window7"),),) * 4,
        d_state: int = 16,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if len(routes) != len(depths) or not all(routes):
            raise ValueError(f"routes must have one list, not empty, for each of {len(depths)} stages, got {routes}")

        def block(stage: int, index: int, dim: int, drop_path: float) -> MixerBlock:
            own = routes[stage][index % len(routes[stage])]
            mixer = SS2D(
                dim, d_state, 2.0, conv_bias=True, gate=True, routes=own, merge="stack", proj_drop=proj_drop_rate, **dd
            )
            return MixerBlock(dim, mixer, drop_path, Norm, **dd)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=PatchStem(in_chans, embed_dim, **dd),
            downsample=partial(PatchMerging, norm_layer=Norm, **dd),
            block=block,
            norm=Norm(dims[-1], **dd),
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )


# ---- Variants -------------------------------------------------------------------------------------------------------

_BASES = {"h": "row", "v": "column", "w2": "window2", "w7": "window7"}


def searched(blocks: str) -> tuple[tuple[str, ...], ...]:
    """The routes of some blocks from the authors' short names, blocks parted by commas; "-" walks from the end."""
    return tuple(
        tuple(_BASES[name.rstrip("-")] + "_reversed" * name.endswith("-") for name in block.split())
        for block in blocks.split(",")
    )


_TINY = (
    searched("h h- w7 w7-, h- v- w2 w2-"),
    searched("h- v- w2- w7, h- v v- w2"),
    searched(
        "h h- v- w2-, h- v- w2 w2-, h w2- w7 w7-, h h- v v-, h v- w7 w7-, h- v w2 w7-, v v- w2 w7-, h h- v- w2-, "
        "v- w2- w7 w7-"
    ),
    searched("h- v- w2- w7-, h- v w7 w7-"),
)
_SMALL = (
    searched("h v v- w7-, h h- v w7"),
    searched("h- v v- w7, h- v w2- w7"),
    searched(
        "h- v w2- w7, h- v- w2 w7-, h- v v- w7, h v v- w7, h v v- w7, h v v- w7-, h h- v v-, h v v- w2, v v- w2- w7, "
        "h h- v w2, h- v v- w7-, h h- v v-, h v v- w7-, h v v- w7-, h h- v- w7, h- v- w2- w7, h- v v- w7-, "
        "v v- w7 w7-, h v v- w7-, h- v v- w2, h v v- w2-, h h- v w7, h h- w7 w7-, h v- w2 w2-, h v- w2 w7, "
        "h v v- w7-, h- v w2- w7"
    ),
    searched("h- v- w7 w7-, h v w7 w7-"),
)

VARIANTS = {
    "local_vmamba_tiny": dict(embed_dim=96, depths=(2, 2, 9, 2), routes=_TINY, drop_path_rate=0.2),
    "local_vmamba_small": dict(embed_dim=96, depths=(2, 2, 27, 2), routes=_SMALL, drop_path_rate=0.2),
}

# Files of the authors' release; that of tiny has never been published.
_FILES = {"local_vmamba_tiny": None, "local_vmamba_small": "local_vssm_small"}


def cfg(file: str | None, first_conv: str = "stem.conv1", **kwargs):
    return imagenet_cfg(
        f"https://github.com/hunto/LocalMamba/releases/download/v1.0.0/{file}.ckpt" if file else "",
        first_conv=first_conv, license="apache-2.0", paper_ids="arXiv:2403.09338",
        origin_url="https://github.com/hunto/LocalMamba", **kwargs,
    )


default_cfgs = generate_default_cfgs({f"{variant}.in1k": cfg(file) for variant, file in _FILES.items()})


register_variants(__name__, VARIANTS, create_from(LocalVMamba))
