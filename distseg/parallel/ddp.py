"""DistributedDataParallel.

Every rank holds the whole network, gradients are averaged as backward goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.compat import ddp_without_buffer_broadcast, measure_no_backwards
from distseg.distributed.ranks import Ranks
from distseg.parallel.full_copy import copy_with
from distseg.parallel.torch_learner import BackwardStart, TorchLearner, dtype_of


class DDPLearner(TorchLearner):
    """A network under DDP with its optimizer; see distseg.parallel.Learner."""

    def __init__(
        self, network: nn.Module, optimizer: OptimizerConfig, config: Config, ranks: Ranks
    ):
        # before DDP, whose buckets are cut for the parameters as they are when it is made
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        network = network.to(ranks.device, dtype_of(config))
        network.to(memory_format=layout)  # type: ignore[call-overload]
        # Running statistics are averaged once a forward; DDP's own broadcast would keep only rank
        # 0's.
        self.ddp = DistributedDataParallel(
            network,
            # a list is an error on CPUs
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            # gradients are views of the buckets that are sent: no second copy of them in memory
            gradient_as_bucket_view=True,
            **ddp_without_buffer_broadcast(),
        )
        measure_no_backwards(self.ddp)
        super().__init__(network, self.ddp, optimizer, config, ranks)

    def full_network(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See Learner.full_network: it always is."""
        # a copy: the network itself goes on training with its own weights
        return self.network if tensors is None else copy_with(self.network, tensors)

    def no_sync(self) -> AbstractContextManager[None]:
        """See Learner.no_sync."""
        return self.ddp.no_sync()

    @staticmethod
    def backward(work: Sequence[tuple[DDPLearner, Sequence[BackwardStart]]]) -> None:
        """See distseg.parallel.backward: ONE backward into the parameters of all learners.

        Autograd runs the graph made last first: the discriminator's gradients are ready, and their
        all-reduce under way, before the segmentor's backward begins; each DDP waits for its own
        only at the very end. Naming the parameters leaves out every gradient that nobody asked for,
        such as the one to the fake label maps.
        """
        parameters: list[Tensor] = []
        starts: list[BackwardStart] = []
        for learner, of_learner in work:
            parameters += learner.trained
            starts += of_learner
        # one call: of two, the second would start when the first has waited for its all-reduce
        tensors, gradients = zip(*starts, strict=True)
        torch.autograd.backward(tensors, gradients, inputs=parameters)
