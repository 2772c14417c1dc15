"""Depthwise convolution with TensorFlow's SAME padding, and a fast bf16 backward on CPUs."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_exporting

Pads = tuple[int, int, int, int]  # left, right, top, bottom: the order of F.pad
Geometry = tuple[Pads, int, int]  # padding, stride, dilation

# Whether bf16 convolutions on the CPU go to oneDNN: not with AVX2 alone, nor where
# ONEDNN_MAX_CPU_ISA forbids it. Without it torch's own kernels take 30 to 100 times as long as
# fp32's, and sum weight gradients over images in bf16.
_ONEDNN_HAS_BF16: bool = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after `size` inputs that make ceil(size / stride) outputs.

    Where their number is odd, there is one more after.
    """
    reach = (kernel - 1) * dilation
    total = reach - (size - 1) % stride  # what the last output's filter needs beyond the last input
    if reach < stride - 1:  # a filter shorter than its stride may need none
        total = max(total, 0)
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
    """One filter per channel, SAME padding; state dict and values as nn.Conv2d(groups=channels).

    x: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)). Raises ValueError for an even
    kernel_size.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        bias: bool = False,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size}: an even filter has no middle; use an odd one"
            )
        super().__init__(
            channels, channels, kernel_size, stride, dilation=dilation, groups=channels, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        pads = same_pads(x, self)
        if x.device.type == "cpu" and _autocast_is_bf16():
            x, weight = x.to(torch.bfloat16), self.weight.to(torch.bfloat16)
            if _ONEDNN_HAS_BF16:
                y = _Depthwise.apply(x, weight, (pads, self.stride[0], self.dilation[0]))
                return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)
            x, padding = _pad(x.float(), pads)
            with torch.autocast("cpu", enabled=False):
                y = F.conv2d(
                    x, weight.float(), self.bias, self.stride, padding, self.dilation, self.groups
                )
            return y.to(torch.bfloat16)
        x, padding = _pad(x, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class _Depthwise(torch.autograd.Function):
    """The convolution with a backward of its own, channels_last inside.

    oneDNN's bf16 gradients of 5x5, dilated and stride-2 depthwise convolutions take 10 to 80 times
    as long as the forward pass; these take two to six times (measured on AVX512-BF16 CPUs with
    oneDNN 3.12).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        (left, right, top, bottom), stride, dilation = geometry
        ctx.geometry, ctx.size = geometry, x.shape
        if (left, top) != (right, bottom):
            x = _fit(x, top, left, top + x.shape[2] + bottom, left + x.shape[3] + right)
            left = top = 0
        ctx.save_for_backward(x, weight)
        ctx.padding = (top, left)
        return F.conv2d(x, weight, None, stride, ctx.padding, dilation, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        _, stride, dilation = ctx.geometry
        grad_x = grad_weight = None
        with torch.autocast("cpu", enabled=False):
            if wants_x:
                grad_x = _input_gradient(grad, weight, ctx.size, ctx.geometry)
            if wants_weight:
                grad_weight = torch.empty_like(weight)  # in the strides that DDP expects
                grad_weight.copy_(
                    _weight_gradient(grad, x, weight, ctx.padding, (stride, dilation))
                )
        return grad_x, grad_weight, None


def _input_gradient(grad: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """Stride-1 convolutions of `grad` with the turned filters, as fast as the forward pass.

    With a stride, the rows r, r + stride, ... of the input (and columns alike) saw only every
    stride-th tap: each such set of pixels is one small convolution.
    """
    (left, _, top, _), stride, dilation = geometry
    if stride == 1:
        reach = (weight.shape[-1] - 1) * dilation
        padding = (reach - top, reach - left)
        return F.conv2d(grad, weight.flip(2, 3), None, 1, padding, dilation, groups=weight.shape[0])
    grad_x = _empty(grad, size[0], size[2], size[3])
    for row, column in product(range(stride), repeat=2):
        taps = weight[:, :, row::stride, column::stride].flip(2, 3)
        y, above, height = _reach(size[2], taps.shape[2], row - top, stride)
        x, before, width = _reach(size[3], taps.shape[3], column - left, stride)
        if taps.numel() == 0:
            # a filter shorter than its stride steps over these
            grad_x[:, :, y::stride, x::stride] = 0
        elif y < size[2] and x < size[3]:
            seen = _fit(grad, above, before, height, width)
            grad_x[:, :, y::stride, x::stride] = F.conv2d(seen, taps, groups=weight.shape[0])
    return grad_x


def _reach(size: int, num_taps: int, offset: int, stride: int) -> tuple[int, int, int]:
    """First input that a set of taps saw; zeros before the gradient; its length with them."""
    first = offset % stride
    output = (first - offset) // stride  # the one whose first tap lies on `first`
    return first, num_taps - 1 - output, num_taps - 1 + len(range(first, size, stride))


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], steps: tuple[int, int]
) -> Tensor:
    """Put together from gradients of undilated 3x3 filters, the only ones that oneDNN computes
    fast.
    """
    stride, dilation = steps
    kernel = weight.shape[-1]
    if kernel == 3 and dilation == 1 and (stride == 1 or padding == (0, 0)):
        return _gradient_3x3(grad, x, weight, stride, padding)
    height, width = (-(-side // dilation) for side in grad.shape[-2:])  # outputs in one phase
    # inputs that 3 taps see there
    rows, columns = ((side - 1) * stride + 3 for side in (height, width))
    num_taps = 3 * -(-kernel // 3)
    size = ((rows + num_taps - 3) * dilation, (columns + num_taps - 3) * dilation)
    x = _fit(x, *padding, *size)
    grad = _phases(_fit(grad, 0, 0, height * dilation, width * dilation), dilation)
    tiled = weight.new_empty(weight.shape[0], 1, num_taps, num_taps)
    for i, j in product(range(0, kernel, 3), repeat=2):
        seen = x[
            :, :, i * dilation : (i + rows) * dilation, j * dilation : (j + columns) * dilation
        ]
        tile = tiled[:, :, i : i + 3, j : j + 3]
        tile.copy_(_gradient_3x3(grad, _phases(seen, dilation), tile, stride, (0, 0)))
    return tiled[:, :, :kernel, :kernel]


def _gradient_3x3(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]
) -> Tensor:
    """Weight gradient of a 3x3 depthwise convolution; only the shape and type of `weight` count."""
    options = ([stride] * 2, padding, [1, 1], False, [0, 0], weight.shape[0], [False, True, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options)[1]


def _phases(x: Tensor, step: int) -> Tensor:
    """(N, C, h * step, w * step) -> (N * step * step, C, h, w).

    Pixels `step` apart become neighbours.
    """
    num, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(num, height // step, step, width // step, step, channels)
    split = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, height // step, width // step, channels)
    return split.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _fit(x: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A height x width window onto `x` that begins `top` above and `left` of it; zeros around `x`.

    F.pad would first fill all of it with zeros: a second pass over memory, which is what bounds
    these layers.
    """
    rows, columns = x.shape[-2:]
    bottom, right = min(top + rows, height), min(left + columns, width)
    if (top, left, height, width) == (0, 0, rows, columns):
        return x
    y0, x0 = max(top, 0), max(left, 0)
    window = _empty(x, x.shape[0], height, width)
    window[:, :, y0:bottom, x0:right] = x[:, :, y0 - top : bottom - top, x0 - left : right - left]
    window[:, :, :y0], window[:, :, bottom:] = 0, 0
    window[:, :, y0:bottom, :x0], window[:, :, y0:bottom, right:] = 0, 0
    return window


def _empty(like: Tensor, num: int, height: int, width: int) -> Tensor:
    """(num, C, height, width), channels_last, with the channels and type of `like`."""
    return like.new_empty(num, height, width, like.shape[1]).permute(0, 3, 1, 2)


def _pad(x: Tensor, pads: Pads) -> tuple[Tensor, tuple[int, int]]:
    """`x` and the padding left to the convolution: all of it where it is even, else none of it."""
    left, right, top, bottom = pads
    # exporting: which it is may depend on the size
    if not is_exporting() and left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, pads), (0, 0)


def _autocast_is_bf16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
