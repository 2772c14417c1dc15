"""Which shard of a parameter this rank holds.

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
class ParameterShard:
    """Rows `start` to `start + len(rows)` of a tensor of `shape`.

    Shard `index` of `count`; of one, it is the full tensor.
    """

    rows: Tensor  # the very memory of the rank; of a full tensor, itself
    shape: tuple[int, ...]
    start: int = 0
    index: int = 0
    count: int = 1


@torch.no_grad()  # with gradients, to_local would cost a node of the graph
def shard_of(tensor: Tensor) -> ParameterShard:
    """What this rank holds of a tensor: under FSDP as many rows for each rank, rounded up."""
    if not is_sharded(tensor):
        return ParameterShard(tensor, tuple(tensor.shape))
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError("a tensor of a device mesh that this rank is not in")
    # of a mesh (replicas, shards) the last dimension cuts
    index, count = coordinate[-1], mesh.shape[-1]
    rows_per_shard = -(-tensor.shape[0] // count)
    start = min(index * rows_per_shard, tensor.shape[0])
    return ParameterShard(tensor.to_local().detach(), tuple(tensor.shape), start, index, count)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor.

    Told by its mesh, as importing the class takes seconds that few runs need.
    """
    return hasattr(tensor, "device_mesh")


def num_elements(parameter: Tensor) -> int:
    """Of the full parameter, whatever this rank holds of it (under ZeRO-3 often nothing)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def sharded_like(rows: Tensor, like: Tensor) -> Tensor:
    """A rank's rows as its shard of a tensor that is sharded like `like`; a full one as it is."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    where = (like.device_mesh, like.placements)
    return DTensor.from_local(rows, *where, run_check=False, shape=like.shape, stride=like.stride())


def load_full(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, joined from all ranks' shards, into a plain network; called on every rank."""
    network.load_state_dict(
        {
            name: tensor.full_tensor() if is_sharded(tensor) else tensor
            for name, tensor in tensors.items()
        }
    )
