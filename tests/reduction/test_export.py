"""torch.compile in one graph, torch.export and ONNX: the outputs are those of eager PyTorch."""
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn

from visionbb.reduction import reduce_tokens

from .conftest import build

RECIPES = [
    ("tome", dict(r=10)), ("tofu", dict(r=10)), ("pitome", dict(r=10)), ("mctf", dict(r=10)),
    ("zero_tprune", dict(keep=0.7)), ("diffrate", dict(r=10)), ("evit", dict(keep=0.7, fuse_token=True)),
    ("dynamic_vit", dict(keep=0.7)),
]
EACH = pytest.mark.parametrize(
    ("family", "method", "kwargs"),
    [(family, *recipe) for family, recipe in zip(cycle(("deit", "dinov3")), RECIPES)],
    ids=[method for method, _ in RECIPES],
)


class AllOutputs(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), *self.model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)


def reduced(network: nn.Module, method: str, kwargs: dict) -> nn.Module:
    model = reduce_tokens(network, method, **kwargs)
    for p in model.reducer.method.parameters():  # untrained predictors find all tokens alike: rounding would choose
        if p.ndim == 2:
            p.mul_(20)
    return AllOutputs(model).eval()


@pytest.fixture(params=["deit", "dinov3"])
def network(request) -> nn.Module:
    return build(request.param)


@pytest.mark.parametrize(("method", "kwargs"), RECIPES)
@torch.no_grad()
def test_compiles_in_one_graph(network, images, method, kwargs):
    model = reduced(network, method, kwargs)
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(got, model(images), rtol=1e-4, atol=1e-5)


@EACH
@torch.no_grad()
def test_exports_with_any_batch(family, images, method, kwargs):
    model = reduced(build(family), method, kwargs)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    three = torch.cat((images, images[:1] * 2))
    torch.testing.assert_close(exported(three), model(three), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@EACH
@torch.no_grad()
def test_runs_in_onnxruntime(images, family, method, kwargs):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = reduced(build(family), method, kwargs)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    three = torch.cat((images, images[:1] * 2))
    got = session.run(None, {session.get_inputs()[0].name: three.numpy()})
    for one, want in zip(got, model(three)):
        np.testing.assert_allclose(one, want.numpy(), rtol=1e-3, atol=2e-4)
