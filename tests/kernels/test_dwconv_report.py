"""The depthwise convolutions' part of the ahead-of-time report: what models run is in it, and compiles."""
from __future__ import annotations

import os

import pytest
import timm
import torch

import visionbb  # noqa: F401  (registers the models)
from visionbb.mixers import DepthwiseConv

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions do not compile"
)

if os.environ.get("TRITON_INTERPRET") != "1":
    from visionbb.kernels import _aot
    from visionbb.kernels.dwconv.report import Shape, cases, launches


@pytest.mark.parametrize(
    "name",
    [
        "ravlt_tiny", "mavit_large", "nalaformer_xtiny", "care_s0", "care_s1", "care_s2", "mila_base", "l2vit_tiny",
        "vmamba_base", "vmamba_tiny_s2l5", "vanilla_vmamba_base", "vssd_micro", "vssd_tiny", "vssd_base",
    ],
)
def test_layers_of_a_model_are_listed(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found = set()

    def note(module, args):
        found.add(str(Shape(args[0].shape[1], args[0].shape[3], tuple(module.weight.shape[2:]), module.residual)))

    for module in model.modules():
        if isinstance(module, DepthwiseConv):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert found == {case.shape for case in cases() if name in case.models}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("number", [0, 1], ids=["forward", "weight_gradient"])
def test_compiles_without_spills(number, target):
    launch, work = list(launches(Shape(28, 64, (3, 3), True), torch.bfloat16))[number]
    build = _aot.build(launch, target)
    assert build.sound, build
    assert not build.matrix
    assert work == 32 / 28  # columns


def test_binaries_serve_kernels_of_any_width_and_maps_of_any_size():
    def source(side, kernel):
        launch, _ = next(launches(Shape(side, 64, kernel, False), torch.bfloat16))
        return _aot.source(launch).hash()

    assert source(56, (5, 5)) == source(56, (5, 1)) == source(72, (5, 11))
    assert source(56, (5, 5)) != source(56, (3, 5))
