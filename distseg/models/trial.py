"""A network of the user's own, made and tried on random images before anything depends on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shards import user_code
from shards.errors import InputError
from shards.user_code import UserCode


def made(key: str, reference: str, num_classes: int, options: Mapping[str, Any]) -> Trial:
    """The network that a reference makes for so many classes, to be tried.

    key: segmentor or discriminator. Raises InputError as user_code.load and user_code.call do, and
    for what is no network.
    """
    code = user_code.load(reference, key)
    network = user_code.call(code, key, options, f"{key}.options", num_classes=num_classes)
    if not isinstance(network, nn.Module):
        got = f"{key}={reference} makes a {type(network).__name__}"
        raise InputError(got, "a torch.nn.Module", "return the network itself")
    trial = Trial(network, code, key)
    # a trial is of a copy, which would not give the network itself its shapes
    lazy = [name for name, it in network.named_parameters() if is_lazy(it)]
    if lazy:
        needed = "parameters whose shapes the constructor knows, as of nn.Conv2d"
        raise trial.refused(f"{lazy[0]} has no shape yet, as of nn.LazyConv2d", needed)
    return trial


@dataclass(frozen=True)
class Trial:
    """A network and where it comes from, for messages."""

    network: nn.Module
    code: UserCode
    key: str

    def refused(self, got: str, needed: str, action: str = "") -> InputError:
        """The error for what the network does."""
        return InputError(
            f"{self.key}={self.code.reference}: {got}",
            needed,
            action or f"correct {self.code.name}",
        )

    def positive(self, name: str, default: int) -> int:
        """An attribute of the network in pixels. Raises InputError for one that is no such."""
        value = getattr(self.network, name, default)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        # networks are tried at this size
        if not is_whole or not 1 <= value <= MAX_SIZE_PX:
            needed = f"a whole number of pixels, from 1 to {MAX_SIZE_PX}"
            raise self.refused(f"{name}={value!r}", needed)
        return value

    def copied(self) -> nn.Module:
        """A copy to try: forwards change statistics, and whatever else a network counts."""
        try:
            # the trained network itself stays as its constructor left it
            return copy.deepcopy(self.network)
        except Exception as error:
            got = f"cannot be copied: {user_code.told(error, self.code.path)}"
            raise self.refused(got, "a network that copy.deepcopy copies") from error

    def answer(self, network: Callable[..., Any], *inputs: Tensor, needed: str = "") -> Any:
        """network(*inputs). Raises InputError for what goes wrong in it."""
        shapes = ", ".join(str(tuple(each.shape)) for each in inputs)
        before = [each.detach().clone() for each in inputs]
        try:
            with undisturbed():
                found = network(*inputs)
        except BaseException as error:
            if not user_code.is_own(error):
                raise
            got = f"called with {shapes}: {user_code.told(error, self.code.path)}"
            needed = needed or "an answer to float tensors of any size"
            action = _ONE_VALUE if "more than 1 " in str(error) else ""
            raise self.refused(got, needed, action) from error
        # overlapping windows of one image would be normalised twice, and so would what comes next
        if not all(map(torch.equal, before, inputs)):
            got = "changes the tensor that it is called with"
            action = "write image = image - mean, in place of image.sub_(mean) or image -= mean"
            raise self.refused(got, "a forward that leaves its inputs as they are", action)
        return found

    def check_finite(self, answer: Tensor, what: str) -> None:
        """Raise InputError for NaN and infinity."""
        if not bool(answer.isfinite().all()):
            raise self.refused(f"{what} are not finite (NaN or infinity)", "finite numbers")

    def check_gradients(
        self, network: nn.Module, answers: Iterable[Tensor], inputs: Sequence[Tensor] = ()
    ) -> None:
        """Raise InputError unless every parameter that is not frozen gets a gradient of answers.

        network: the copy that gave them. One without would leave the other ranks waiting. inputs:
        what has to get one besides, the label maps that a segmentor learns through.
        """
        wanted = {name: it for name, it in network.named_parameters() if it.requires_grad}
        if not wanted:
            raise self.refused("no parameter to train", "parameters with requires_grad")
        # of all answers, or an auxiliary head's parameters would count as unreached
        loss = sum((answer.float().square().mean() for answer in answers), torch.zeros(()))
        if not loss.requires_grad:
            got = "its answer has no gradient (detached, or computed without one)"
            raise self.refused(got, "an answer made of its parameters by differentiable steps")
        sources = [*wanted.values(), *inputs]
        # not `backward`: None tells a parameter that nothing reached from one whose gradient is 0
        gradients = torch.autograd.grad(loss, sources, allow_unused=True)
        # zip ends with the parameters: the inputs' gradients follow them
        without = [name for name, it in zip(wanted, gradients, strict=False) if it is None]
        if without:
            some = ", ".join(without[:4]) + (", ..." if without[4:] else "")
            action = "use it in the forward, or freeze it: parameter.requires_grad_(False)"
            raise self.refused(f"no gradient reaches {some}", "one for each parameter", action)
        if any(gradient is None for gradient in gradients):
            got = "no gradient reaches the label map"
            raise self.refused(got, "one that the segmentor can follow")

    def check_same_tensors(self, network: nn.Module) -> None:
        """Raise InputError where a forward of a copy has changed what a checkpoint would hold."""
        before, after = _shapes(self.network), _shapes(network)
        # full copies for evaluation and checkpoints are made by the names and shapes of the start
        names = [name for name in after | before if before.get(name) != after.get(name)]
        if names:
            was, now = before.get(names[0], "none"), after.get(names[0], "none")
            got = f"{names[0]} has the shape {now} after a forward, and {was} before"
            needed = "parameters and buffers of the shapes that the constructor gives them"
            action = "make it in the constructor, or register_buffer(..., persistent=False)"
            raise self.refused(got, needed, action)

    def check_range(
        self,
        found: Iterable[Tensor],
        answer: Callable[[nn.Module], Iterable[Tensor]],
        outside: Callable[[Tensor], Tensor],
    ) -> None:
        """Raise InputError for logits that are in a range of probabilities whatever the weights.

        found: the logits of the network; answer: those of a copy with other weights; outside: where
        a logit is one that no probability is.
        """
        seed = 0
        while not any(bool(outside(each).any()) for each in found):
            # an untrained network may give such values by chance, but not with other weights too
            seed += 1
            if seed > NUM_REDRAWS:
                got = "its answers stay in the range of probabilities, whatever its weights are"
                needed = "logits: the loss takes the sigmoid or softmax itself"
                raise self.refused(got, needed, "return what comes before that last layer")
            network = self.copied().eval()
            _redraw(network, seed)
            with torch.no_grad():
                found = list(answer(network))

    def tried(self, network: nn.Module, *inputs: Tensor, needed: str) -> Any:
        """The answer of a copy of a network to inputs as a step has them, large ones too.

        Of tensors without values where those will do. Raises InputError as `answer` does.
        """
        if max(max(each.shape[-2:]) for each in inputs) > LARGE_PX:
            # whatever goes wrong without values is tried again with some
            with suppress(Exception):
                return on_meta(network, *inputs)
        return self.answer(copy.deepcopy(network), *inputs, needed=needed)


MAX_SIZE_PX = 1024
LARGE_PX = 256  # above it a forward may take a minute on a CPU
NUM_REDRAWS = 4
_ONE_VALUE = (
    "take more images at a time (batch_size, gradient_accumulation_steps), or a normalisation "
    "that needs no other images there, as nn.GroupNorm"
)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@torch.no_grad()
def _redraw(network: nn.Module, seed: int) -> None:
    """Other weights of about the same size, so that activations keep theirs."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
        # biases begin at 0: with these the last layer's answers would keep their sign
        drawn = torch.randn(parameter.shape, generator=generator) * (spread or 0.1)
        parameter.copy_(drawn)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random numbers drawn within change none that are drawn later, on CPUs."""
    # a trial must not change the seed's first weights and crops; CPU alone, as networks are tried
    # there
    with torch.random.fork_rng(devices=[]):
        yield


@dataclass(frozen=True)
class StepImages:
    """What the networks get at a time in a training step, on one rank.

    num_labelled and num_unlabelled images, squares of side_px, with label maps of label_map_px.
    """

    num_labelled: int
    num_unlabelled: int
    side_px: int
    label_map_px: int

    @property
    def num_all(self) -> int:
        return self.num_labelled + self.num_unlabelled


def on_meta(network: nn.Module, *inputs: Tensor) -> Any:
    """The answer of a copy of a network to inputs without values, in no time and memory.

    Raises what torch does, for a network that looks at values for example.
    """
    return copy.deepcopy(network).to("meta")(*(each.to("meta") for each in inputs))


def shaped(network: nn.Module, *inputs: Tensor) -> Any:
    """The network's answer to inputs, of which only shapes and `requires_grad` count."""
    try:
        return on_meta(network, *inputs)
    except Exception:  # one of the user's own that looks at values
        with undisturbed():
            return copy.deepcopy(network)(*inputs)


def random_images(count: int, height: int, width: int) -> Tensor:
    """(count, 3, height, width) float in [0, 1]; the same at every call."""
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(0))


def random_label_maps(count: int, num_classes: int, side: int) -> Tensor:
    """(count, num_classes, side, side) float, sums to 1 over C; the same at every call."""
    shape = (count, num_classes, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).softmax(1)


def odd_multiple(multiple: int, least: int) -> int:
    """The first odd multiple from `least` on, which no larger power of 2 divides."""
    return multiple * (math.ceil(least / multiple) | 1)
