"""The CPU layers against torch's own: values, gradients, and the statistics and seeds of dropout."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmran.accel import cpu_layers
from cmran.accel.cpu_layers import Dropout, Linear, dropout, linear_relu


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (2, 3, 5, 7), (1, 1, 7), (0, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_equals_torch(shape, dtype):
    torch.manual_seed(0)
    layer = Linear(7, 4).to(dtype)
    ours, theirs = torch.randn(2, *shape, dtype=dtype)[0].requires_grad_(), None
    theirs = ours.detach().clone().requires_grad_()
    plain = nn.Linear(7, 4).to(dtype)
    plain.load_state_dict(layer.state_dict())
    out, expected = layer(ours), plain(theirs)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(expected.shape, dtype=dtype)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_linear_of_a_view():
    torch.manual_seed(0)
    layer, x = Linear(6, 3), torch.randn(4, 5, 6, 2)[..., 0].transpose(0, 1)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


class LinearReLUDropout(nn.Module):
    """Linear, ReLU and dropout, as in the network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = Linear(6, 3), Dropout(0.5)

    def forward(self, x):
        return linear_relu(self.linear, x, self.dropout)


@pytest.mark.parametrize("layers", [nn.Sequential(Linear(6, 3), Dropout(0.5)), LinearReLUDropout()])
def test_exported_graph_contains_plain_operations(layers):
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(layers.eval(), (torch.randn(2, 5, 6),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("linear" in target for target in targets)
    assert not any(name in target for target in targets for name in ("conv", "mkldnn", "SFC64"))


@pytest.mark.parametrize("p", [None, 0.0, 0.3])
@pytest.mark.parametrize("shape", [(300, 64), (4, 5, 64), (2, 3, 50, 64)])
@pytest.mark.parametrize("expanded", [True, False])
def test_linear_relu_under_autocast(shape, p, expanded):
    torch.manual_seed(0)
    layer, dropout = Linear(64, 32), None if p is None else Dropout(p)
    x = torch.randn(shape)
    weights = torch.randn(*shape[:-1], 32)

    def gradients(function, x):
        x = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(1)
        out = function(x)
        # The gradient of a sum is an expanded tensor.
        (out if expanded else out * weights).sum().backward()
        return out, x.grad, layer.weight.grad, layer.bias.grad

    def plain(x):
        out = F.relu(F.linear(x, layer.weight, layer.bias))
        return out if dropout is None else dropout(out)

    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda x: linear_relu(layer, x, dropout), x)
        same = gradients(plain, x)
    exact = gradients(plain, x)
    assert found[0].dtype == torch.bfloat16
    assert found[2].dtype == found[3].dtype == torch.float32
    # The same elements are dropped, and no result is much further from float32 than that of torch's own bfloat16
    # operations: the gradient of the input is rounded once more, for the scale.
    assert torch.equal(found[0] == 0, same[0] == 0)
    for ours, theirs, expected in zip(found, same, exact, strict=True):
        assert (ours - expected).abs().mean() <= 1.5 * (theirs - expected).abs().mean() + 1e-6


def test_gradient_of_linear_relu_has_an_unrounded_dropout_scale():
    torch.manual_seed(0)
    layer, dropout = Linear(64, 2), Dropout(0.1)
    x = torch.randn(4000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        if not cpu_layers._can_fuse(layer, x):
            pytest.skip("this CPU has no native bfloat16")
        out = linear_relu(layer, x, dropout)
    out.sum().backward()
    # The count is rounded to bfloat16 but 1 / 0.9 is not: rounded, it would be 0.16 % too small.
    kept = (out > 0).sum(0).bfloat16()
    torch.testing.assert_close(layer.bias.grad, kept.float() / 0.9)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (1, 7)])
def test_linear_relu_of_few_rows_under_autocast(shape):
    layer = Linear(7, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_relu(layer, torch.ones(shape), Dropout(0.5))
    assert out.shape == (*shape[:-1], 4)
    out.sum().backward()
    assert layer.weight.grad.shape == (4, 7)


@pytest.mark.parametrize("p", [None, 0.5])
@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_linear_relu_keeps_nan_under_autocast(where, p):
    torch.manual_seed(0)
    layer, x = Linear(64, 32), torch.randn(20, 64)
    broken = {"input": x, "weight": layer.weight, "bias": layer.bias}[where]
    broken.data.view(-1)[5] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_relu(layer, x, None if p is None else Dropout(p))
    assert out.isnan().any()


def test_linear_relu_of_other_precisions_and_without_bias_under_autocast():
    torch.manual_seed(0)
    double, x = Linear(7, 4).double(), torch.randn(5, 3, 7)
    no_bias = Linear(7, 4, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_relu(double, x.double()).dtype == torch.float64
        torch.testing.assert_close(linear_relu(double, x.double()), F.relu(double(x.double())))
        torch.testing.assert_close(linear_relu(no_bias, x), F.relu(no_bias(x)))


def test_cpu_without_bfloat16_falls_back_to_torch():
    program = """
import torch
from cmran.accel.cpu_layers import Dropout, Linear, linear_relu
with torch.autocast("cpu", torch.bfloat16):
    linear_relu(Linear(64, 32), torch.randn(9, 5, 64), Dropout(0.5)).sum().backward()
print("trained")
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "trained\n", found.stderr


@pytest.mark.parametrize("autocast", [True, False])
def test_linear_relu_in_evaluation_mode(autocast):
    torch.manual_seed(0)
    both, x = LinearReLUDropout().eval(), torch.randn(9, 5, 6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = both(x)
        expected = F.relu(F.linear(x, both.linear.weight, both.linear.bias))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.99])
def test_dropout_keeps_the_expected_share_and_mean(p, dtype):
    torch.manual_seed(0)
    ones = torch.ones(400, 1001, dtype=dtype)
    out = dropout(ones, p, True)
    kept = (out != 0).double().mean().item()
    # Five standard deviations of the share of 400,400 elements.
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / ones.numel()) ** 0.5
    # The product is rounded once; the scale is not rounded.
    assert out.unique().tolist() == [0, torch.tensor(1 / (1 - p), dtype=torch.float64).to(dtype).item()]
    # Adjacent elements, which share a random word, are independent.
    zeros = (out == 0).double()
    both = (zeros[:, :-1] * zeros[:, 1:]).mean().item()
    assert both == pytest.approx(p * p, abs=0.01)


def test_dropout_scale_is_not_rounded_to_the_dtype():
    torch.manual_seed(0)
    x = 1 + torch.rand(4000, 100, dtype=torch.float64)
    x = x.bfloat16()
    out = dropout(x, 0.1, True)
    kept = out != 0
    # Each value is rounded to 8 bits, up or down; 1 / 0.9 rounded to 8 bits would be 0.16 % too small.
    ratio = out[kept].double().sum() / x[kept].double().sum()
    assert ratio.item() == pytest.approx(1 / 0.9, rel=2e-4)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (3,), (2, 3, 4, 5)])
def test_dropout_of_any_shape(shape):
    x = torch.ones(shape, requires_grad=True)
    out = dropout(x, 0.5, True)
    assert out.shape == shape
    assert out.dtype == torch.float32
    assert set(out.flatten().tolist()) <= {0.0, 2.0}
    out.sum().backward()


def test_dropout_follows_torchs_seed_and_advances_its_generator():
    x = torch.ones(100, 100)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(1)
    again = dropout(x, 0.5, True)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 0.3, 1 - 1e-9])
@pytest.mark.parametrize("expanded", [True, False])
def test_gradient_of_dropout(p, expanded):
    def function(x):
        torch.manual_seed(3)
        out = Dropout(p)(x)
        # The gradient of a sum is an expanded tensor.
        return out.sum(0) if expanded else out

    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_no_dropout_in_evaluation():
    x = torch.randn(5, 6)
    assert torch.equal(Dropout(0.5).eval()(x), x)
