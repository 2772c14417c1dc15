"""Depthwise convolution with TensorFlow's SAME padding, and a fast bf16 backward on CPUs."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Pads = tuple[int, int, int, int]  # left, right, top, bottom: the order of F.pad
Geometry = tuple[Pads, int, int]  # padding, stride, dilation


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after `size` inputs that make ceil(size / stride) outputs; the odd one goes after."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def same_pads(x: Tensor, conv: nn.Conv2d) -> Pads:
    """SAME padding of `x` (N, C, H, W) for `conv`."""
    top, bottom = same_padding(x.shape[-2], conv.kernel_size[0], conv.stride[0], conv.dilation[0])
    left, right = same_padding(x.shape[-1], conv.kernel_size[1], conv.stride[1], conv.dilation[1])
    return left, right, top, bottom


class SameConv2d(nn.Conv2d):
    """nn.Conv2d with SAME padding at any input size."""

    def forward(self, x: Tensor) -> Tensor:
        x, padding = _pad(x, same_pads(x, self))
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class DepthwiseConv2d(nn.Conv2d):
    """One filter per channel, SAME padding, no bias; state dict and values as nn.Conv2d(groups=channels).

    x: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, dilation: int = 1):
        super().__init__(
            channels, channels, kernel_size, stride, dilation=dilation, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        pads = same_pads(x, self)
        if x.device.type == "cpu" and _autocast_is_bf16():
            x, weight = x.to(torch.bfloat16), self.weight.to(torch.bfloat16)
            return _Depthwise.apply(x, weight, (pads, self.stride[0], self.dilation[0]))
        x, padding = _pad(x, pads)
        return F.conv2d(x, self.weight, None, self.stride, padding, self.dilation, self.groups)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        pads, stride, dilation = geometry
        padded, padding = _pad(x, pads)
        return F.conv2d(padded, weight, None, stride, padding, dilation, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            wants_x, wants_weight, _ = ctx.needs_input_grad
            grad_x = _input_gradient(grad, weight, x.shape, ctx.geometry) if wants_x else None
            grad_weight = _weight_gradient(grad, x, weight, ctx.geometry) if wants_weight else None
        return grad_x, grad_weight, None


def _input_gradient(grad: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """Stride-1 convolutions of `grad` with the turned filters, as fast as the forward pass.

    With a stride, the rows r, r + stride, ... of the input (and columns alike) saw only every stride-th tap:
    each such set of pixels is one small convolution.
    """
    (left, _, top, _), stride, dilation = geometry
    turned = weight.flip(2, 3)
    if stride == 1:
        reach = (weight.shape[-1] - 1) * dilation
        return F.conv2d(grad, turned, None, 1, (reach - top, reach - left), dilation, groups=weight.shape[0])
    grad_x = grad.new_empty(size[0], *size[2:], size[1]).permute(0, 3, 1, 2)
    for row, column in product(range(stride), repeat=2):
        taps = weight[:, :, row::stride, column::stride].flip(2, 3)
        y, above, below = _reach(size[2], grad.shape[2], taps.shape[2], row - top, stride)
        x, before, after = _reach(size[3], grad.shape[3], taps.shape[3], column - left, stride)
        padded, padding = _pad(grad, (before, after, above, below))
        grad_x[:, :, y::stride, x::stride] = F.conv2d(padded, taps, None, 1, padding, groups=weight.shape[0])
    return grad_x


def _reach(size: int, num_outputs: int, num_taps: int, offset: int, stride: int) -> tuple[int, int, int]:
    """First of the input's positions that a set of taps touched, and zeros its gradient needs on both ends."""
    first = offset % stride
    start = (first - offset) // stride  # the output whose tap 0 lies on `first`
    return first, num_taps - 1 - start, start + len(range(first, size, stride)) - num_outputs


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Put together from gradients of undilated 3x3 filters, the only ones that oneDNN computes fast."""
    (left, _, top, _), stride, dilation = geometry
    kernel = weight.shape[-1]
    if kernel == 3 and geometry == ((1, 1, 1, 1), 1, 1):
        return _gradient_3x3(grad, x, weight, 1, padding=1)
    num_tiles = -(-kernel // 3)
    height, width = (-(-side // dilation) for side in grad.shape[-2:])  # outputs of one phase
    rows, columns = ((side - 1) * stride + 3 for side in (height, width))  # inputs that 3 taps see
    extra = 3 * (num_tiles - 1)
    x = _fit(x, top, left, (rows + extra) * dilation, (columns + extra) * dilation)
    x, grad = _phases(x, dilation), _phases(_fit(grad, 0, 0, height * dilation, width * dilation), dilation)
    tiled = weight.new_empty(weight.shape[0], 1, 3 * num_tiles, 3 * num_tiles)
    for i, j in product(range(0, kernel, 3), repeat=2):
        tile = tiled[:, :, i : i + 3, j : j + 3]
        seen = x[:, :, i : i + rows, j : j + columns]
        tile.copy_(_gradient_3x3(grad, seen.contiguous(memory_format=torch.channels_last), tile, stride, 0))
    return tiled[:, :, :kernel, :kernel]


def _gradient_3x3(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Weight gradient of a 3x3 depthwise convolution; of `weight` only the shape and type count."""
    options = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], weight.shape[0], [False, True, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options)[1]


def _phases(x: Tensor, step: int) -> Tensor:
    """(N, C, h * step, w * step) -> (N * step * step, C, h, w): pixels `step` apart become neighbours."""
    if step == 1:
        return x
    num, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(num, height // step, step, width // step, step, channels)
    split = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, height // step, width // step, channels)
    return split.permute(0, 3, 1, 2)


def _fit(x: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """`x` with zeros around it so that it measures height x width."""
    return F.pad(x, (left, width - left - x.shape[-1], top, height - top - x.shape[-2]))


def _pad(x: Tensor, pads: Pads) -> tuple[Tensor, tuple[int, int]]:
    """`x` and the padding left to the convolution: all of it where it is even, else none of it."""
    left, right, top, bottom = pads
    if left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, pads), (0, 0)


def _autocast_is_bf16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
