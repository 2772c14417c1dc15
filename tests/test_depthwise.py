"""The depthwise convolution equals the library's, in values and gradients, whichever path computes
it.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.models import depthwise
from distseg.models.depthwise import (
    DepthwiseConv2d,
    SameConv2d,
    _Depthwise,
    same_padding,
    same_pads,
)

pytestmark = pytest.mark.cpu

# kernel, stride, dilation
GEOMETRIES = [
    (3, 1, 1),
    (3, 2, 1),
    (5, 1, 1),
    (5, 2, 1),
    (5, 1, 2),
    (3, 1, 2),
    (3, 1, 9),
    (3, 3, 1),
    (1, 2, 1),
]


def by_hand(x, weight, stride, dilation):
    """TensorFlow's SAME rule written out: a padded copy, then the plain convolution."""
    kernel = weight.shape[-1]
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        outputs = (size + stride - 1) // stride
        total = max(0, (outputs - 1) * stride + dilation * (kernel - 1) + 1 - size)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, None, stride, 0, dilation, groups=x.shape[1])


def gradients(output, inputs, seed=0):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(
        output.dtype
    )
    return torch.autograd.grad(output, inputs, upstream)


@pytest.mark.parametrize("size", [(12, 13), (15, 15), (7, 2), (1, 1)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_own_backward_equals_the_librarys_in_float64(geometry, size):
    kernel, stride, dilation = geometry
    conv = DepthwiseConv2d(6, kernel, stride, dilation).double()
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    expected = by_hand(x, conv.weight, stride, dilation)
    own = _Depthwise.apply(x, conv.weight, (same_pads(x, conv), stride, dilation))
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    for ours, reference in zip(
        gradients(own, (x, conv.weight)), gradients(expected, (x, conv.weight)), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.sampled_from((1, 3, 5, 7)),
    stride=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_own_backward_holds_for_any_kernel_stride_and_size(kernel, stride, height, width):
    conv = DepthwiseConv2d(2, kernel, stride).double()
    x = torch.randn(2, 2, height, width, dtype=torch.float64, requires_grad=True)
    own = gradients(
        _Depthwise.apply(x, conv.weight, (same_pads(x, conv), stride, 1)), (x, conv.weight)
    )
    reference = gradients(by_hand(x, conv.weight, stride, 1), (x, conv.weight))
    for ours, expected in zip(own, reference, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_autocast_differs_from_float64_by_bf16_rounding_only(geometry, memory_format):
    conv = DepthwiseConv2d(16, *geometry)
    # values that bf16 holds exactly: what remains is the rounding of results
    conv.weight.data = conv.weight.data.bfloat16().float()
    x = (
        torch.randn(2, 16, 15, 14)
        .bfloat16()
        .float()
        .to(memory_format=memory_format)
        .requires_grad_()
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    upstream = torch.randn(y.shape).bfloat16()
    own = torch.autograd.grad(y, (x, conv.weight), upstream)
    exact = by_hand(x.double(), conv.weight.double(), *geometry[1:])
    reference = torch.autograd.grad(exact, (x, conv.weight), upstream.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-2)
    for ours, expected in zip(own, reference, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=2**-8, atol=2e-2)


def test_frozen_weights_and_inputs_get_no_gradient():
    conv = DepthwiseConv2d(4, 3, 2)
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).sum().backward()
        assert x.grad is None and conv.weight.grad is not None
        conv.weight.grad = None
        conv.requires_grad_(False)
        conv(x.requires_grad_()).sum().backward()
        with torch.no_grad():
            assert not conv(x).requires_grad
    assert x.grad is not None and conv.weight.grad is None


def test_one_layer_used_twice_adds_up_both_gradients():
    conv = DepthwiseConv2d(8, 5)
    first, second = torch.randn(2, 2, 8, 9, 9)

    def weight_gradient(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(conv(x).float().square().sum() for x in inputs)
        return torch.autograd.grad(loss, conv.weight)[0]

    both = weight_gradient(first, second)
    torch.testing.assert_close(
        both, weight_gradient(first) + weight_gradient(second), rtol=2**-7, atol=1e-3
    )


def test_state_dict_is_a_plain_convolutions():
    conv = DepthwiseConv2d(4, 5, 2)
    plain = torch.nn.Conv2d(4, 4, 5, 2, groups=4, bias=False)
    plain.load_state_dict(conv.state_dict())
    assert torch.equal(plain.weight, copy.deepcopy(conv).weight)


@pytest.mark.parametrize("size", [(33, 47), (32, 32), (5, 8)])
def test_same_convolution_follows_tensorflows_rule(size):
    conv = SameConv2d(3, 3, 3, stride=2, groups=3, bias=False)
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(conv(x), by_hand(x, conv.weight, 2, 1))


def test_same_padding_puts_the_odd_zero_after():
    assert same_padding(224, 3, 2, 1) == (0, 1)
    assert same_padding(225, 3, 2, 1) == (1, 1)
    assert same_padding(15, 5, 1, 2) == (4, 4)


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_bias_is_added_whichever_path_computes_the_rest(kernel, monkeypatch):
    conv = DepthwiseConv2d(6, kernel, bias=True)
    plain = torch.nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=6)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 11, 14, requires_grad=True)
    torch.testing.assert_close(conv(x), plain(x))
    inputs = [x, conv.weight, conv.bias]
    expected = gradients(plain(x), [x, plain.weight, plain.bias])
    for has_bf16 in (True, False):
        monkeypatch.setattr(depthwise, "_ONEDNN_HAS_BF16", has_bf16)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), plain(x), rtol=0.02, atol=0.03)
        for ours, reference in zip(gradients(y, inputs), expected, strict=True):
            size = float(reference.abs().max())
            torch.testing.assert_close(ours.float(), reference, rtol=0, atol=0.02 * size)
