"""FSDP2: every rank holds a shard of each parameter, its gradient and its optimizer state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.compat import BATCH_NORM, forget_fsdp_forwards
from distseg.distributed.ranks import Ranks, all_reduce_sum
from distseg.parallel.full_copy import FullCopies
from distseg.parallel.parameter_shards import shard_of, sharded_like
from distseg.parallel.torch_learner import BackwardStart, TorchLearner, dtype_of
from shards.errors import InputError

# The segmentor's logits are a view, of which FSDP warns at every start; nothing here changes them
# in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

# a layer with so many is gathered by itself, when it is its turn; the rest all at once
BLOCK_PARAMETERS = 2**20


class FSDPLearner(TorchLearner):
    """A network under FSDP2 with its optimizer; see distseg.parallel.Learner.

    Parameters are kept in full precision and autocast chooses the kernels' types, so the numbers
    are DDP's; with parallel.gather_dtype=bf16 blocks get them rounded to what most kernels would
    round them to, and their gradients are summed over the ranks in fp32 all the same. The optimizer
    works on the plain tensors behind the DTensors: its fused kernels, with `found_inf`, as
    everywhere else.
    """

    def __init__(
        self, network: nn.Module, optimizer: OptimizerConfig, config: Config, ranks: Ranks
    ):
        # FSDP shards contiguous parameters only; channels_last is then a matter of the images
        network = network.to(ranks.device, dtype_of(config))
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # while it is still a plain network
        self._full_copies = FullCopies(network)
        self._mesh = mesh = _mesh(dist.group.WORLD, ranks, config.parallel.shard_size)
        self._in_bf16 = config.parallel.gather_dtype == "bf16"
        _shard(network, mesh, self._in_bf16)
        self._syncs = True
        self._num_replicas = mesh.size(0) if mesh.ndim == 2 else 1
        # plain tensors in the DTensors' memory: updating one updates the other
        own_shards: dict[Tensor, Tensor] = {
            parameter: nn.Parameter(shard_of(parameter).rows, parameter.requires_grad)
            for parameter in network.parameters()
        }
        super().__init__(network, network, optimizer, config, ranks, own_shards=own_shards)

    def full_network(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See Learner.full_network: a copy, as of this call."""
        values = self.network.state_dict() if tensors is None else tensors
        return self._full_copies.make(self.network, values)

    def twin(self) -> nn.Module:
        """See Learner.twin: parameter shards, as this network's."""
        network = self._full_copies.make(self.network, self.network.state_dict()).eval()
        # its root too is gathered anew in every forward: no backward lets go of it, and what has
        # been averaged since would not be seen
        _shard(network, self._mesh, self._in_bf16, reshard_after_forward=True)
        return network

    def infer(self, network: nn.Module, *inputs: Tensor) -> Any:
        """See Learner.infer."""
        output = super().infer(network, *inputs)
        # a teacher never has a backward; before the segmentor's own it would prefetch for these
        forget_fsdp_forwards(network)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """See Learner.no_sync."""
        before = self._syncs
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(before)

    def _set_sync(self, syncs: bool) -> None:
        self._syncs = syncs
        self.network.set_requires_gradient_sync(syncs)  # type: ignore[operator]

    @staticmethod
    def backward(work: Sequence[tuple[FSDPLearner, Sequence[BackwardStart]]]) -> None:
        """See distseg.parallel.backward: ONE backward, the discriminator's graph first, as it was
        made last.

        No parameters are named, as under DDP: FSDP reduces what its hooks on the way find, and a
        backward towards named tensors goes past them. The gradient that reaches the fake label
        maps, a leaf, is lost with them.
        """
        starts: list[BackwardStart] = []
        for _, of_learner in work:
            starts += of_learner
        tensors, gradients = zip(*starts, strict=True)
        torch.autograd.backward(tensors, gradients)

    def _take_gradients(self) -> None:
        for parameter, tensor in self._own_shards.items():
            if parameter.grad is not None:
                tensor.grad = shard_of(parameter.grad).rows
                parameter.grad = None  # or the next backward would add to it

    def _norm_over_ranks(self, norm: Tensor) -> Tensor:
        # Over ALL ranks, so that all get the same bits and decide alike; each replica adds the same
        # float64: in fp32 the square of a norm above 1.8e19 is infinite, which skips a step
        squares = all_reduce_sum(norm.double().square()) / self._num_replicas
        return squares.sqrt().to(norm.dtype)

    def _sharded_as(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        counts_steps = tensor.ndim == 0  # AdamW's; no parameter is a single number
        return tensor if counts_steps else sharded_like(tensor, parameter)


def _shard(
    network: nn.Module,
    mesh: DeviceMesh,
    in_bf16: bool,
    reshard_after_forward: bool | None = None,
) -> None:
    # The inputs of a block are cast too, as some kernels want both alike. Gradients are summed over
    # the ranks in fp32.
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # layers before the root, which takes what is left
    for block in [*blocks(network), network]:
        is_rounded = in_bf16 and block is not network and not _has_batch_norm(block)
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=rounded if is_rounded else MixedPrecisionPolicy(),
        )


def _has_batch_norm(block: nn.Module) -> bool:
    # whose kernels want parameters in the type of its statistics
    return any(isinstance(layer, BATCH_NORM) for layer in block.modules())


def check_gathering(network: nn.Module) -> None:
    """Raise InputError for a network of which nothing would be gathered in bf16."""
    if all(map(_has_batch_norm, blocks(network))):
        needed = f"a segmentor with blocks of {BLOCK_PARAMETERS:,} parameters or more without "
        needed += "batch normalisation, such as dpt_vitb14"
        got = "parallel.gather_dtype=bf16 for a network that has no block for it"
        raise InputError(got, needed, "write parallel.gather_dtype=fp32")


def blocks(network: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: the large ones in a Sequential or ModuleList,
    none within another.

    Others are used through more than their forward, such as a weight that is read by the layer
    around it.
    """
    containers = (nn.Sequential, nn.ModuleList)
    found: list[nn.Module] = []
    for child in network.children():
        # a container within a container is looked into, as it would be gathered whole
        is_layer = isinstance(network, containers) and not isinstance(child, containers)
        num_parameters = sum(parameter.numel() for parameter in child.parameters())
        if is_layer and num_parameters >= BLOCK_PARAMETERS:
            found.append(child)
        else:
            found += blocks(child)
    return found


@lru_cache(maxsize=1)  # both networks on one mesh, and so on the same communicators
def _mesh(world: dist.ProcessGroup, ranks: Ranks, shard_size: int) -> DeviceMesh:
    """All ranks in a row; or (replicas, shards), the ranks of a row next to each other."""
    # `world` is in the arguments for the cache: a later job of this process has another group
    if shard_size in (0, ranks.world_size):
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = (ranks.world_size // shard_size, shard_size)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replica", "shard"))
