"""DistributedDataParallel.

Every rank holds the whole network, gradients are averaged as backward goes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.ranks import Ranks
from distseg.parallel.torch_learner import TorchLearner, dtype_of
from distseg.parallel.whole_copy import with_values

# torch 2.13 renamed the argument
_BROADCAST = (
    "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
)
_NO_BUFFER_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if _BROADCAST else "broadcast_buffers": False
}


class DDPLearner(TorchLearner):
    """A network under DDP with its optimizer; see distseg.parallel.Learner."""

    def __init__(
        self, network: nn.Module, optimizer: OptimizerConfig, config: Config, ranks: Ranks
    ):
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        network = network.to(ranks.device, dtype=dtype_of(config), memory_format=layout)  # type: ignore[call-overload]
        # Running statistics are averaged once a forward; DDP's own broadcast would keep only rank
        # 0's.
        self._ddp = DistributedDataParallel(
            network,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            **_NO_BUFFER_BROADCAST,
            gradient_as_bucket_view=True,
        )
        super().__init__(network, self._ddp, optimizer, config, ranks)

    def whole(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See Learner.whole: it always is."""
        return self.network if tensors is None else with_values(self.network, tensors)

    def no_sync(self) -> AbstractContextManager[None]:
        """See Learner.no_sync."""
        return self._ddp.no_sync()

    @staticmethod
    def backward(work: Sequence[tuple[DDPLearner, Sequence[tuple[Tensor, Tensor | None]]]]) -> None:
        """See distseg.parallel.backward: ONE backward into the parameters of all learners.

        Autograd runs the graph made last first: the discriminator's gradients are ready, and their
        all-reduce under way, before the segmentor's backward begins; each DDP waits for its own
        only at the very end. Naming the parameters leaves out every gradient that nobody asked for,
        such as the one to the fake label maps.
        """
        parameters = [parameter for learner, _ in work for parameter in learner.trained]
        roots, gradients = zip(*(root for _, roots in work for root in roots), strict=True)
        torch.autograd.backward(roots, gradients, inputs=parameters)
