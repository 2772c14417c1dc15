"""An exponential moving average of a network's parameters and buffers, for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distseg.parallel import Learner
from distseg.parallel.parameter_shards import shard_of


class MovingAverage:
    """average = decay * average + (1 - decay) * network after every step of it; whole-number
    buffers are copied.

    A step that was skipped, as its gradient was not finite, counts too: only the device knows of
    it, and the running statistics have moved. Where this rank holds shards of the network's
    parameters, it averages those. The decay warms up as (1 + n) / (10 + n) after n steps, so
    that the initial weights are soon forgotten (the rule of TensorFlow's
    ExponentialMovingAverage).
    """

    def __init__(self, source: Learner, decay: float, as_network: bool = False):
        """as_network: kept as a network that can be asked in every step, as a teacher is."""
        self.decay = decay
        self.network = source.twin() if as_network else None
        # state_dict and not parameters: buffers too, as averaged weights beside the last batch's
        # running statistics would be scored with statistics of other weights
        self._source, new = source, source.network.state_dict()
        if self.network is None:
            self._average = {name: tensor.clone() for name, tensor in new.items()}
        else:
            # the network's own memory, so that it is the average
            self._average = dict(self.network.state_dict())
        # Looked up once: the learner's tensors stay the same memory, and to list those of FSDP
        # takes long
        self._pairs = list(zip(_held(self._average), _held(new), strict=True))
        # a tensor, as checkpoints hold nothing else; on the CPU, so that reading it waits for no
        # device
        self.num_updates = torch.zeros((), dtype=torch.int64)

    def full_network(self) -> nn.Module:
        """A copy of the averaged network with all its parameters, in evaluation mode.

        Called on every rank.
        """
        return self._source.full_network(self._average).eval()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the source's present state."""
        # how often this was called: after the segmentor's steps, as in blocks of the discriminator
        # nothing moves
        self.num_updates += 1
        n = int(self.num_updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        # for one foreach call, instead of a kernel's launch for each of some hundred tensors
        averages, present = [], []
        for average, tensor in self._pairs:
            if average.is_floating_point():
                averages.append(average)
                present.append(tensor)
            else:
                # counters of batches, which have no average that is whole
                average.copy_(tensor)
        torch._foreach_lerp_(averages, present, 1.0 - decay)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The averaged network's tensors, and how often `update` was called."""
        return {"network": self._average, "counters": {"num_updates": self.num_updates}}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy in what `state_dict` gave."""
        # told by name: `copy_` would leave those that are missing at this process's initial weights
        if self._average.keys() != state["network"].keys():
            different = sorted(self._average.keys() ^ state["network"].keys())
            raise KeyError(f"EMA weights: {different[:4]} on one side only")
        for name, tensor in self._average.items():
            # into the same memory, which `_pairs` and a strategy's own views point to
            tensor.copy_(state["network"][name])
        self.num_updates.copy_(state["counters"]["num_updates"])


def _held(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [shard_of(tensor).rows for tensor in tensors.values()]
