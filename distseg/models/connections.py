"""Where a network looks, measured on its own forward: output stride and field of view, without its
weights.

Nothing is known of the network but that it is called. It is built on the meta device, run with
every layer replaced by the simplest one that has the same connections, and the gradient of one
output is followed back to the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shards.errors import InputError

# strips long enough for any field of view that ends at all; the second only where the first is seen
# to its ends. Multiples of any stride, or a last cell would hang over
PROBES_PX = (512, 4096)

# the network, what it is to see -> logits (N, C', h, w)
Forward = Callable[[nn.Module, Tensor], Tensor]


def geometry(
    network: nn.Module, forward: Forward, channels: int
) -> tuple[int, tuple[int, int] | None]:
    """Output stride, and height and width of the input that the middle logit depends on; None if
    that is all of it.

    `network` is on the meta device, in eval mode. Along each axis a strip is sent through with
    every layer replaced by the simplest one that has its connections (see `Connections`), and the
    gradient of one logit is followed back. The stride is the quotient of the strip's length and the
    output's.
    """
    stride, sides = 0, []
    for axis in (2, 3):
        for length in PROBES_PX:
            # narrow across: a strip costs as much as it is long, not its square
            shape = [1, channels] + [getattr(network, "min_size_px", 32)] * 2
            shape[axis] = length
            num_logits, gradient = _middle_gradient(network, forward, shape, axis)
            # the quotient of sides, as a last cell may be cut off
            stride = round(length / num_logits)
            seen = (gradient != 0).any(3 - axis).nonzero().ravel()
            if len(seen) == 0:
                got = f"{type(network).__name__}: its output does not depend on its input"
                raise InputError(
                    got,
                    "a network",
                    "look for a detached tensor, or mend distseg/models/connections.py",
                )
            first, last = int(seen[0]), int(seen[-1])
            # seen to its ends: a field as long as the strip may be longer
            if first > 0 and last < length - 1:
                sides.append(last - first + 1)
                break
        else:
            return stride, None
    return stride, (sides[0], sides[1])


def _middle_gradient(
    network: nn.Module, forward: Forward, shape: list[int], axis: int
) -> tuple[int, Tensor]:
    """Logits along `axis` for an input of `shape`, and the gradient (H, W) of the middle one,
    summed over channels.
    """
    probe = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    with Connections():
        logits = forward(Filled(network, _ones), probe)
    (gradient,) = torch.autograd.grad(
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], probe
    )
    return logits.shape[axis], gradient[0].sum(0)


class Filled(nn.Module):
    """A network on the meta device, called with values that `fill` makes of a shape and a dtype."""

    def __init__(self, network: nn.Module, fill: Callable[..., Tensor]):
        super().__init__()
        self.network = network
        self.values: dict[str, Tensor] = {}
        # each module by one of its names: functional_call would not restore what it replaces by two
        for path, module in network.named_modules():
            own = [
                *module.named_parameters(path, recurse=False),
                *module.named_buffers(path, recurse=False),
            ]
            self.values |= {name: fill(value.shape, dtype=value.dtype) for name, value in own}

    def forward(self, *inputs: Tensor) -> Any:
        return torch.func.functional_call(self.network, self.values, inputs, tie_weights=False)


def _ones(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """All 1, float64 if they are floats: one number in memory, whatever the shape."""
    return torch.ones((), dtype=torch.float64 if dtype.is_floating_point else dtype).expand(shape)


class Connections(TorchFunctionMode):
    """Runs a network's forward with its connections alone: which input reaches which output, and
    nothing else.

    Convolutions become means over their window and all channels, poolings means, differences sums,
    activations and normalisations nothing. So no gradient is lost to a dead unit, a maximum,
    saturation or cancellation; and since all channels of a layer then see the same, one is computed
    where a layer has hundreds, and shown that many times.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        stand_in = STAND_INS.get(getattr(func, "__name__", ""), func)
        return stand_in(*args, **(kwargs or {}))


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _whole(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x + x.mean((1, 2, 3), keepdim=True)  # normalised by the statistics of the image


def _by_name(names: str, values: tuple, named: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call by their names, whichever of them were given by position."""
    return dict(zip(names.split(), values, strict=False)) | dict(named)


def _convolution(x: Tensor, weight: Tensor, bias: Any = None, *values: Any, **named: Any) -> Tensor:
    options = _by_name("stride padding dilation groups", values, named)
    # with one channel there are no groups; a grouped layer is taken as seeing all channels, at the
    # same places
    options.pop("groups", None)
    y = F.conv2d(_one_channel(x), _window(weight), None, **options)
    return y.expand(-1, weight.shape[0], -1, -1)


def _transposed_convolution(
    x: Tensor, weight: Tensor, bias: Any = None, *values: Any, **named: Any
) -> Tensor:
    options = _by_name("stride padding output_padding groups dilation", values, named)
    # its weight has the output channels of one group
    groups = options.pop("groups", 1)
    y = F.conv_transpose2d(_one_channel(x), _window(weight), None, **options)
    return y.expand(-1, weight.shape[1] * groups, -1, -1)


def _pooling(x: Tensor, kernel_size: Any, *values: Any, **named: Any) -> Tensor:
    options = _by_name("stride padding dilation ceil_mode return_indices", values, named)
    dilation, indices = options.pop("dilation", 1), options.pop("return_indices", False)
    if indices or dilation not in (1, (1, 1)):
        got = f"max_pool2d with dilation={dilation}, return_indices={indices}"
        raise InputError(got, "a plain one", "teach distseg/models/connections.py this pooling")
    return _each_channel(F.avg_pool2d)(x, kernel_size, **options)


def _sum(x: Any, y: Any, **_: Any) -> Any:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape):
        return x + y
    # a plain sum would give every channel memory of its own again
    return (_lean(x, y) + _lean(y, x)).expand_as(x)


def _product(x: Any, y: Any, **_: Any) -> Any:
    # all weights are 1, and one number in memory
    if isinstance(y, Tensor) and not y.requires_grad and y.numel() > 1 and not any(y.stride()):
        return x
    return x * y


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    features = x[..., :1] if x.stride(-1) == 0 else x.mean(-1, keepdim=True)
    return features.expand(*x.shape[:-1], weight.shape[0])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    # every token looks at every token, with weights that see its own query
    seen = value.mean(-2, keepdim=True) + key.mean((-2, -1), keepdim=True)
    return query.mean(-1, keepdim=True).expand_as(query) + seen.expand_as(query)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    joined = torch.cat([_lean(each, *tensors, but=dim) for each in tensors], dim)
    shape = list(tensors[0].shape)
    shape[dim] = joined.shape[dim]
    return joined.expand(shape)


def _lean(x: Tensor, *others: Tensor, but: int | None = None) -> Tensor:
    """x without the copies along dimensions in which it and all the others are one in memory."""
    kept = range(x.ndim)[but] if but is not None else None
    for dim in range(x.ndim):
        if dim != kept and not any(each.stride(dim) for each in (x, *others)):
            x = x.narrow(dim, 0, 1)
    return x


def _sum_in_place(x: Tensor, y: Any, **_: Any) -> Tensor:
    if not _is_shared(x):
        return x.add_(y)
    # their memory is one
    x[:, :1].add_(_one_channel(y) if isinstance(y, Tensor) and y.ndim == 4 else y)
    return x


def _each_channel(function: Callable) -> Callable:
    """`function` of (x, ...), which treats all channels alike, computed once where they are the
    same.
    """

    def once(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _is_shared(x):
            return function(x, *args, **kwargs)
        return function(x[:, :1], *args, **kwargs).expand(-1, x.shape[1], -1, -1)

    return once


def _is_shared(x: Any) -> bool:
    """Whether all channels of x (N, C, H, W) are one in memory."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 0


def _one_channel(x: Tensor) -> Tensor:
    return x[:, :1] if _is_shared(x) else x.mean(1, keepdim=True)


def _window(weight: Tensor) -> Tensor:
    height, width = weight.shape[-2:]
    return torch.full((1, 1, height, width), 1 / (height * width), dtype=torch.float64)


_PER_PIXEL = (
    *("relu", "relu6", "leaky_relu", "hardtanh", "elu", "gelu", "silu", "hardswish", "mish"),
    *("tanh", "sigmoid", "hardsigmoid", "softplus", "clamp", "softmax", "log_softmax"),
    *("batch_norm", "layer_norm", "dropout", "dropout2d"),
)
# by the names under which torch's functions and methods are intercepted; a last "_" means in place
STAND_INS: dict[str, Callable] = {
    **dict.fromkeys(_PER_PIXEL, _same),
    **dict.fromkeys((f"{name}_" for name in _PER_PIXEL), _same),
    **dict.fromkeys(("group_norm", "instance_norm"), _whole),
    "conv2d": _convolution,
    "conv_transpose2d": _transposed_convolution,
    "max_pool2d": _pooling,
    **{
        name: _each_channel(getattr(F, name))
        for name in ("interpolate", "avg_pool2d", "adaptive_avg_pool2d")
    },
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "multiply"), _product),
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "cat": _joined,
    **dict.fromkeys(("add_", "sub_"), _sum_in_place),
}
