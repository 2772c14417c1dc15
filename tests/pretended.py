"""A device that this machine does not have, pretended on its CPU, and what would make a host wait
for it.

Its tensors say that they are elsewhere, so what is read from it and what is sent to it is seen as
on a GPU: on a CPU alone a copy to the same device is no operation at all. The registration is for
the whole process and for good, so it belongs into one of its own (tests/ranks.py).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAME = "pretended"
ROOT = Path(__file__).parent.parent
# what must know a number, or how many there are, before it returns
READS = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal"}
READS |= {"unique_consecutive", "_unique2", "unique_dim", "bincount", "histc"}


class OnDevice(Tensor):
    """A tensor of the device; its values lie in `held`, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, **layout, dtype=held.dtype, device=f"{NAME}:0"
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's refuses all tensors that are not plain


def _computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; of the device is what came from it, or is asked for there."""
    given: dict[int, OnDevice] = {}

    def taken(tensor: OnDevice) -> Tensor:
        given[id(tensor.held)] = tensor
        return tensor.held

    plain = tree_map_only(OnDevice, taken, (args, kwargs))
    asked = kwargs.get("device")
    is_there = bool(given) if asked is None else _is_device(asked)
    if asked is not None and is_there:
        plain[1]["device"] = torch.device("cpu")
    result = func(*plain[0], **plain[1])
    if not is_there:
        return result
    # what was worked on in place is the tensor that was given
    return tree_map_only(
        Tensor, lambda it: given[id(it)] if id(it) in given else OnDevice(it), result
    )


class HostWaits(TorchDispatchMode):
    """Notes each operation for which the host would wait for the device, and the line that asked.

    everywhere: every tensor counts as one of the device, where there is none and the CPU computes.
    """

    def __init__(self, everywhere: bool = False):
        super().__init__()
        self.kind = Tensor if everywhere else OnDevice
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        why = self._wait(func, args, kwargs)
        if why:
            self.found.append(f"{why} at {_place()}")
        return _computed(func, args, kwargs)

    def _wait(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> str:
        """What waits; "" where nothing does."""
        name = func.overloadpacket.__name__
        if name in READS and isinstance(args[0], self.kind):
            return name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [it for it in args[1] if isinstance(it, self.kind) and it.dtype == torch.bool]
            return "a mask as index" if masks else ""
        if name == "repeat_interleave" and isinstance(args[0], self.kind):
            return name
        if name in ("_to_copy", "copy_", "_copy_from"):
            return self._copied(name, args, kwargs)
        return ""

    def _copied(self, name: str, args: tuple, kwargs: dict[str, Any]) -> str:
        """Either way a copy waits until all that was asked for before is done, unless it is told
        not to.
        """
        source, is_late = args[-1], kwargs.get("non_blocking", False)
        if name == "_to_copy":
            target = kwargs.get("device")
            there = isinstance(source, OnDevice) if target is None else _is_device(target)
        else:
            there, source = isinstance(args[0], OnDevice), args[1]
            is_late = is_late or (len(args) > 2 and args[2])
        is_from = isinstance(source, OnDevice)
        # one number of the host goes along with the kernel
        if is_from == there or (name == "copy_" and not is_from and source.ndim == 0):
            return ""
        if is_from:  # late or not: its values would not be there yet
            return "a copy to the host"
        return "" if is_late else "a copy from the host"


def _is_device(device: Any) -> bool:
    return torch.device(device).type == NAME


def _place() -> str:
    """The innermost line of this repository that is no part of this tool."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(ROOT)) and frame.filename != __file__
    ]
    own = [frame for frame in frames if ".venv" not in frame.filename]
    if not own:
        return "a place outside of the repository"
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}: {own[-1].line}"


@contextmanager
def pretended() -> Iterator[torch.device]:
    """A device that is there within, in this process."""
    from torch.utils.backend_registration import (
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def manual_seed_all(self, seed: int) -> None: ...

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    # under autocast it computes in the types that it is given
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    with pytest.MonkeyPatch.context() as patched, HostWaits():
        # C++ sends what they make past all modes
        for name in ("tensor", "as_tensor"):
            patched.setattr(torch, name, _in_two_steps(getattr(torch, name)))
        # whose C++ takes no such tensors
        patched.setattr("distseg.parallel.ddp.DistributedDataParallel", Alone)
        yield torch.device(NAME, 0)


def _in_two_steps(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Made on the host, then sent, as torch does it too."""

    def made(values: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(values, OnDevice):
            return values.to(dtype)
        tensor = make(values, dtype=dtype)
        return tensor if device is None else tensor.to(device)

    return made


class Alone(nn.Module):
    """In place of DistributedDataParallel, of one rank."""

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None: ...

    def __init__(self, network: nn.Module, **options: Any):
        super().__init__()
        self.module = network

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield
