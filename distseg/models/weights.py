"""Weights from files: what was loaded, missing and left over; and nothing is executed."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distseg.models.levels import Encoder, Head
from shards.errors import InputError
from shards.words import counted

# the least share of a network's (or its encoder's) tensors that a file must have, unless told
MIN_SHARE = 0.75
# what checkpoints of others keep a state dict under, and what wrappers put before its names
_CONTAINERS = ("state_dict", "model_state", "model_state_dict", "model")
# of DDP, of this package's own networks, and of segmentation libraries
_WRAPPERS = ("module.", "network.", "backbone.", "encoder.")
_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "b1")  # NumPy's
_COUNTER = "num_batches_tracked"
_COMPILED = "_orig_mod."  # torch.compile's, anywhere in a name


@dataclass(frozen=True)
class Weights:
    """A state dict that is in memory already, and where it is from, for messages."""

    state: Mapping[str, Tensor]
    source: str


@dataclass(frozen=True)
class LoadReport:
    """Keys of the module that were loaded or are missing, and keys of the file that nobody took.

    renewed: of those missing, the ones that the file has for another number of classes.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    renewed: tuple[str, ...] = ()

    @property
    def num_tensors(self) -> int:
        """Of the module, without counters of batches, which older files lack."""
        # counters are left out, as a file without them is as good
        return sum(not key.endswith(_COUNTER) for key in self.loaded) + len(self.missing)

    @property
    def share(self) -> float:
        """How many of these the file knows, from 0 to 1."""
        absent = len(self.missing) - len(self.renewed)
        return 1 - absent / self.num_tensors

    def __str__(self) -> str:
        text = f"{self.source}: {counted(len(self.loaded), 'tensor')} loaded"
        if self.renewed:
            text += f"; made anew for another number of classes: {_some(self.renewed)}"
        absent = tuple(key for key in self.missing if key not in self.renewed)
        if absent:
            text += f"; {len(absent)} not in the file, left as they were: {_some(absent)}"
        if self.left_over:
            text += f"; {len(self.left_over)} not used: {_some(self.left_over)}"
        return text


def downloaded_file(
    network: str, files: Sequence[str], source: str = "https://download.pytorch.org/models/"
) -> Path:
    """The first of the published `files` that lies where torch.hub and torchvision download them
    to.

    source: where they are published. Nothing is downloaded here: compute nodes often have no
    network. Raises InputError when there is none.
    """
    # where these put them: a machine that has used them once needs no second copy
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for file in files:
        if (folder / file).is_file():
            return folder / file
    needed = f"{' or '.join(files)} of {source}"
    action = "put the file there, write segmentor.init=PATH of it, or segmentor.init=random"
    raise InputError(f"no published weights of {network} in {folder}", needed, action)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a torch file read with weights_only=True.

    A file of parameter shards, as FSDP's checkpoints have them (NAME.1-of-8.safetensors), is joined
    with its like. A state dict within {"state_dict": ...}, {"model": ...} or {"model_state": ...}
    is taken out. Raises InputError when the file is missing, unreadable, or holds anything but
    tensors by name.
    """
    path = Path(path)
    action = "check the path after init=, or write init=random"
    if not path.is_file():
        raise InputError(f"no file of weights at {path}", "a .safetensors or .pth file", action)
    is_safetensors = path.suffix == ".safetensors"
    try:
        state = _joined(path) if is_safetensors else _unpickled(path)
    # what the two readers raise for files that are cut, empty or something else
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # torch's own message tells the user to open it without that protection
        if isinstance(error, UnpicklingError):
            reason = "it is no torch file, or holds more than tensors, which could run code"
        raise InputError(
            f"{path} cannot be read: {reason}", "a state dict of tensors only", action
        ) from None
    state = _without_containers(state)
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise InputError(f"{path} holds no state dict", "tensors by name", action)
    return dict(state)


def _unpickled(path: Path) -> Any:
    """What a torch file holds, of tensors, numbers, containers, and what training scripts keep
    beside the weights: a best score of NumPy's, and their arguments.
    """
    # weights_only: a pickle runs what it likes when it is opened; these run nothing
    scalar = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [Namespace, np.dtype, *(type(np.dtype(kind)) for kind in _NUMBERS)]
    # NumPy 2 has moved it, and files know either place
    harmless += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals(harmless):
        return torch.load(path, "cpu", weights_only=True)


def _joined(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; where it is one of several with their rows, those of all, in order."""
    sliced = re.fullmatch(r"(.+)\.\d+-of-(\d+)\.safetensors", path.name)
    names = [path.name]
    if sliced:
        names = [
            f"{sliced[1]}.{number}-of-{sliced[2]}.safetensors"
            for number in range(1, int(sliced[2]) + 1)
        ]
    pieces: dict[str, list[Tensor]] = {}
    for name in names:
        for key, tensor in load_file(path.with_name(name)).items():
            pieces.setdefault(key, []).append(tensor)
    return {key: torch.cat(rows) if len(rows) > 1 else rows[0] for key, rows in pieces.items()}


def _without_containers(content: Any) -> Any:
    """{"model": {"state_dict": {...}}} and the like -> the innermost mapping."""
    while isinstance(content, Mapping):
        held = [content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
        if not held:
            break
        content = held[0]
    return content


def load_segmentor(
    segmentor: nn.Module, weights: Weights, *, allow_partial: bool = False
) -> LoadReport:
    """Load a whole segmentor's weights, its encoder's, or those of AdvSemiSeg's DeepLabV2.

    Names may have wrappers' prefixes (module., backbone., encoder., _orig_mod.), in any nesting.
    What the file has for another number of classes keeps its initial weights and is reported.
    allow_partial: take files with less than MIN_SHARE of the tensors too. Raises InputError when
    shapes differ otherwise, no key or too few fit, two fit one tensor, or an encoder's `layout` is
    not the one that the weights were trained with.
    """
    # each part knows what others call its layers
    for part in (segmentor.encoder, getattr(segmentor, "head", None)):
        if isinstance(part, Encoder | Head):
            weights = replace(weights, state=part.translated(weights.state))
    own = segmentor.state_dict()
    foreign = _advsemiseg_names(weights.state)
    _check_layout(segmentor, weights, is_caffe=bool(foreign))
    # a layout is recognised by its own keys, whatever the file is called
    names = foreign or _names_in(own, weights)
    # a sigmoid's scores leave out one class
    num_scores = _num_classes(segmentor) - getattr(segmentor, "is_sigmoid", False)
    module = segmentor
    if not any(name in own and not name.startswith("encoder.") for name in names):
        module = segmentor.encoder  # type: ignore[assignment]  # the file is of nothing else
        # what it has beside must not be taken for a part of the encoder by its name
        names = {n.removeprefix("encoder."): key for n, key in names.items() if n in own}
    return _load(module, names, weights, num_scores, None if allow_partial else "segmentor")


def load_own(network: nn.Module, weights: Weights, num_classes: int) -> LoadReport:
    """Load weights into a network of the user's own; see load_segmentor. Any share will do."""
    return _load(network, _names_in(network.state_dict(), weights), weights, num_classes, None)


def load_discriminator(discriminator: nn.Module, weights: Weights) -> LoadReport:
    """Load a discriminator's weights; see load_segmentor. All but its input layers must fit."""
    names = _names_in(discriminator.state_dict(), weights)
    channels = getattr(discriminator, "num_channels", None) or _num_classes(discriminator)
    return _load(discriminator, names, weights, channels, "discriminator")


def _num_classes(network: nn.Module) -> int:
    return int(network.num_classes)  # type: ignore[arg-type]


def _check_layout(segmentor: nn.Module, weights: Weights, is_caffe: bool) -> None:
    layout = getattr(segmentor.encoder, "layout", None)
    # the classifier of ImageNet, which torchvision's files have and no segmentation network keeps
    is_torchvision = any(_unwrapped(key)[0] == "fc.weight" for key in weights.state)
    origin = "caffe" if is_caffe else "torchvision" if is_torchvision else None
    if layout and origin and layout != origin:
        got = f"{weights.source}: weights trained in the {origin} layout, for a network in the "
        got += f"{layout} layout"
        action = (
            f"choose another file, or deeplabv2_resnet101 with segmentor.options.layout={origin}"
        )
        raise InputError(got, "one layout (where a bottleneck has its stride)", action)


def _names_in(own: Collection[str], weights: Weights) -> dict[str, str]:
    """Names as a network has them -> keys of the file, wrappers' prefixes understood.

    Of a key that the network has not at all, the name without them.
    """
    unwrapped = {key: _unwrapped(key) for key in weights.state}
    # where a file says which of its names are an encoder's, no others are
    has_parts = any(in_encoder for _, in_encoder in unwrapped.values())
    names: dict[str, str] = {}
    for key, (name, in_encoder) in unwrapped.items():
        inside = [] if has_parts and not in_encoder else [f"encoder.{name}"]
        # the name as it stands comes first, and of guesses those that the file's own prefix speaks
        # for
        possible = [key, *inside, name] if in_encoder else [key, name, *inside]
        name = next((candidate for candidate in possible if candidate in own), name)
        if name in names and name in own:
            got = f"{weights.source}: {names[name]} and {key} both stand for {name}"
            raise InputError(got, "one network in the file", "save the one to start from alone")
        names[name] = key
    return names


def _unwrapped(key: str) -> tuple[str, bool]:
    """A key without wrappers' prefixes, and whether one of them says that it is an encoder's."""
    name = key.replace(_COMPILED, "")
    taken: set[str] = set()
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        taken.add(prefix)
        name = name.removeprefix(prefix)
    return name, bool(taken & {"backbone.", "encoder."})


def _load(
    module: nn.Module,
    names: Mapping[str, str],
    weights: Weights,
    num_scores: int,
    whole_part: str | None,
) -> LoadReport:
    """Copy every tensor whose name the module has; the rest of both sides goes into the report.

    names: names -> keys of the file. A fully connected weight (out, in) fits a convolution (out, C,
    k, k) with C * k * k = in, as when VGG's classifier is made convolutional. whole_part: what to
    call the module where it must be known to MIN_SHARE; None: any share will do.
    """
    own = module.state_dict()
    known = {name: weights.state[key] for name, key in names.items() if name in own}
    if not known:
        got = f"{weights.source}: none of its keys fits ({_some(tuple(weights.state))})"
        raise InputError(got, f"keys like {_some(tuple(own))}", "choose the file of this network")
    renewed = _of_other_classes(known, own, num_scores)
    kept = {name: tensor for name, tensor in known.items() if name not in renewed}
    _check_shapes(kept, own, weights.source)
    loaded = tuple(name for name in own if name in kept)
    taken = {names[name] for name in loaded}
    report = LoadReport(
        source=weights.source,
        loaded=loaded,
        missing=tuple(
            name
            for name in own
            if (name not in known or name in renewed) and not name.endswith(_COUNTER)
        ),
        left_over=tuple(key for key in weights.state if key not in taken),
        renewed=tuple(name for name in own if name in renewed),
    )
    if whole_part and report.share < MIN_SHARE:
        raise _too_little(report, whole_part)
    # reshaped: a fully connected layer's numbers lie in memory as the convolution's do
    fitting = {name: known[name].reshape(own[name].shape) for name in report.loaded}
    module.load_state_dict(fitting, strict=False)
    return report


def _check_shapes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in given.items():
        if tensor.shape != own[name].shape and not _is_flat_convolution(tensor, own[name]):
            got = f"{source}: {name} has shape {tuple(tensor.shape)}"
            needed = f"shape {tuple(own[name].shape)}"
            raise InputError(got, needed, "choose the file of this network")


def _too_little(report: LoadReport, part: str) -> InputError:
    known = f"{report.share:.0%} of the {report.num_tensors} tensors of the {part}"
    got = f"{report.source}: only {known} are in it"
    got += f" (missing: {_some(report.missing)}"
    got += f"; unexpected: {_some(report.left_over)})" if report.left_over else ")"
    action = f"choose the file of this network, or write {part}.init=random"
    if part == "segmentor":
        action = "choose the file of this network, or write segmentor.init_partial=true"
    return InputError(got, f"at least {MIN_SHARE:.0%}", action)


def _of_other_classes(
    known: Mapping[str, Tensor], own: Mapping[str, Tensor], num_scores: int
) -> set[str]:
    """Names whose tensors differ from the module's in nothing but the number of classes.

    That is: every size that differs is `num_scores` here and, there, one and the same number.
    """
    sizes: dict[str, set[int]] = {}
    for name, tensor in known.items():
        if tensor.ndim != own[name].ndim:
            continue
        pairs = set(zip(tensor.shape, own[name].shape, strict=True))
        differing = {(there, here) for there, here in pairs if there != here}
        if differing and all(here == num_scores for _, here in differing):
            sizes[name] = {there for there, _ in differing}
    # of one other number: layers that differ by several are another network, not other classes
    return set(sizes) if len(set().union(*sizes.values())) == 1 else set()


def _advsemiseg_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """DeepLabV2's keys -> the keys of a file in the layout of AdvSemiSeg and its forebears; empty
    for other files.

    Their atrous classifiers are called layer5; files converted from Caffe have "Scale." before
    every key.
    """
    names = {}
    for key in state:
        name = _unwrapped(key)[0].removeprefix("Scale.")
        is_classifier = name.startswith("layer5.conv2d_list.")
        names[
            name.replace("layer5.conv2d_list", "aspp") if is_classifier else f"encoder.{name}"
        ] = key
    return names if any(key.startswith("aspp.") for key in names) else {}


def _is_flat_convolution(given: Tensor, own: Tensor) -> bool:
    return given.ndim == 2 and own.ndim == 4 and given.shape == own.flatten(1).shape


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
