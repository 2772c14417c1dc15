"""Which part of a parameter this rank holds.

Rows of its first dimension under FSDP, all of it otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `start + len(rows)` of a tensor of `shape`.

    Slice `index` of `count`, where 1 is all of it.
    """

    rows: Tensor  # the very memory of the rank; of a whole tensor, itself
    shape: tuple[int, ...]
    start: int = 0
    index: int = 0
    count: int = 1


@torch.no_grad()  # with gradients, to_local would cost a node of the graph
def slice_of(tensor: Tensor) -> Slice:
    """What this rank holds of a tensor.

    The rows that FSDP gives it, as many for each rank, rounded up.
    """
    if not is_sliced(tensor):
        return Slice(tensor, tuple(tensor.shape))
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every rank is in the mesh
    index, count = coordinate[-1], mesh.shape[-1]
    start = min(index * -(-tensor.shape[0] // count), tensor.shape[0])
    return Slice(tensor.to_local().detach(), tuple(tensor.shape), start, index, count)


def is_sliced(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor.

    Told by its mesh, as importing the class takes seconds that few runs need.
    """
    return hasattr(tensor, "device_mesh")


def num_elements(parameter: Tensor) -> int:
    """Of the whole parameter, whatever this rank holds of it: none of those that ZeRO-3 has split."""
    return getattr(parameter, "ds_numel", parameter.numel())


def of_same_slice(rows: Tensor, like: Tensor) -> Tensor:
    """A rank's rows as a part of a tensor that is cut like `like`."""
    if not is_sliced(like):
        return rows
    from torch.distributed.tensor import DTensor

    where = (like.device_mesh, like.placements)
    return DTensor.from_local(rows, *where, run_check=False, shape=like.shape, stride=like.stride())


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, joined from all ranks' slices, into a plain network; called on every rank."""
    whole = {name: t.full_tensor() if is_sliced(t) else t for name, t in tensors.items()}
    network.load_state_dict(whole)
