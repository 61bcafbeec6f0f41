from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import visionbb  # noqa: F401  (registers the models)
from visionbb.kernels import na2d
from visionbb.profiling import count_flops, fvcore_flops, peak_memory
from visionbb.profiling.flops import image_shape
from visionbb.profiling.memory import tensor_bytes


@pytest.mark.parametrize(
    ("name", "gmacs", "macts"),
    [
        ("vit_small_patch16_224", 4.60, 11.95),
        ("swin_tiny_patch4_window7_224", 4.50, 17.06),
        ("convnext_tiny", 4.46, 13.44),
    ],
)
def test_counters_agree_with_each_other_and_with_published_numbers(name, gmacs, macts):
    """The numbers are those of timm's benchmark files (Macts) and of the papers."""
    model = timm.create_model(name)
    count = count_flops(model, 224)
    by_fvcore = fvcore_flops(model, torch.randn(1, 3, 224, 224)).total() / 1e9
    assert count.gmacs == pytest.approx(gmacs, rel=5e-3)
    assert by_fvcore == pytest.approx(gmacs, rel=5e-3)
    assert count.gmacs == pytest.approx(by_fvcore, rel=5e-3)
    assert count.macts == pytest.approx(macts, rel=1e-3)
    assert count.uncounted == ()


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny"])
def test_both_counters_know_our_ops(name):
    model = timm.create_model(name)
    # q k^T and p v over 49 keys: 2 N k^2 C multiply-adds a layer.
    depths, dims, sides = (3, 4, 18, 5), (64, 128, 256, 512), (56, 28, 14, 7)
    macs = sum(n * 2 * s**2 * 49 * c for n, c, s in zip(depths, dims, sides, strict=True))
    count = count_flops(model, 224)
    by_fvcore = fvcore_flops(model, torch.randn(1, 3, 224, 224))
    assert count.by_op["visionbb.na2d_qkvpacked"] == 2 * macs
    assert by_fvcore.by_operator()["na2d_qkvpacked"] == macs
    # Published: 4.3 G; fvcore with the authors' own handle for attention: 4.32.
    assert by_fvcore.total() / 1e9 == pytest.approx(4.32, rel=5e-3)
    assert count.gmacs == pytest.approx(4.32, rel=1e-2)


def test_linear_layers_by_hand_and_by_module():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(48, 5), nn.GELU()), nn.Linear(5, 2))
    count = count_flops(model, (3, 4, 4), batch_size=7)
    assert count.flops == 7 * 2 * (48 * 5 + 5 * 2)
    assert count.gmacs == count.flops / 2 / 1e9
    assert count.by_module == {"": count.flops, "1": 7 * 480, "1.0": 7 * 480, "2": 7 * 20}
    assert count.activations == 7 * (5 + 2)
    assert sum(count.by_op.values()) == count.flops


def test_fused_attention_on_the_cpu_counts():
    q = torch.randn(2, 3, 10, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 10 * 10 * 16


def test_counting_needs_no_memory_and_leaves_the_model_alone():
    model = timm.create_model("resnet18")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.layer1.eval()
    used = peak_memory(lambda: count_flops(model, 224), "cpu")
    assert used < 0.01 * tensor_bytes(model)
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_fvcore_keeps_the_mode_of_every_module():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 2))
    model[1].eval()
    fvcore_flops(model, torch.randn(1, 3, 2, 2))
    assert [m.training for m in model.modules()] == [True, True, False, True]


def test_shared_parameters_and_tensor_attributes_are_copied_to_meta():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight = self.a.weight
            self.shift = torch.ones(12)

        def forward(self, x):
            assert self.a.weight is self.b.weight
            return self.b(self.a(x.flatten(1)) + self.shift)

    assert count_flops(Tied(), (3, 2, 2)).flops == 2 * 2 * 12 * 12


@torch.library.custom_op("visionbb_tests::negate", mutates_args=())
def negate(x: torch.Tensor) -> torch.Tensor:
    return -x


@negate.register_fake
def _(x):
    return torch.empty_like(x)


class _Negated(nn.Linear):
    def forward(self, x):
        return negate(super().forward(x))


def test_a_custom_op_without_formula_is_reported_by_name():
    model = _Negated(4, 4)
    with pytest.warns(UserWarning, match="visionbb_tests::negate"):
        count = count_flops(model, (3, 4, 4))
    assert count.uncounted == ("visionbb_tests::negate",)
    assert count.flops == 2 * 12 * 16
    with pytest.warns(UserWarning, match="visionbb_tests::negate"):
        assert fvcore_flops(model, torch.randn(1, 3, 4, 4)).total() == 12 * 16


def test_backward_of_our_op_is_counted():
    q = torch.randn(1, 6, 6, 2, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        na2d(q, q, q, 3).sum().backward()
    forward = 2 * 2 * 36 * 9 * 16
    assert counter.get_total_flops() == forward + forward // 2 * 5


@pytest.mark.parametrize(
    ("size", "shape"), [(8, (3, 8, 8)), ((4, 6), (3, 4, 6)), ((1, 4, 6), (1, 4, 6)), ([5, 5], (3, 5, 5))]
)
def test_image_shape(size, shape):
    assert image_shape(size) == shape


@pytest.mark.parametrize("size", [0, -3, (4,), (1, 2, 3, 4), (3, 0, 4), (2.0, 2.0)])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="input_size"):
        image_shape(size)


def test_bad_batch_size_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        count_flops(nn.Identity(), 8, batch_size=0)
