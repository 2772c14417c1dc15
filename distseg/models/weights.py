"""Weights from files: what was loaded, what is missing, what was left over; nothing executed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.errors import InputError


@dataclass(frozen=True)
class LoadReport:
    """Keys of the module that were loaded or are missing, and keys of the file that nobody took."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} tensors loaded"
        if self.missing:
            text += (
                f"; {len(self.missing)} not in the file, left as they were: {_some(self.missing)}"
            )
        if self.left_over:
            text += f"; {len(self.left_over)} not used: {_some(self.left_over)}"
        return text


def torchvision_file(network: str, files: Sequence[str]) -> Path:
    """The first of torchvision's published `files` that lies where torchvision itself downloads
    them to.

    Nothing is downloaded here: compute nodes often have no network. Raises InputError when there is
    none.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for file in files:
        if (folder / file).is_file():
            return folder / file
    needed = f"{' or '.join(files)} of https://download.pytorch.org/models/"
    action = "put the file there, write segmentor.init=PATH of it, or segmentor.init=random"
    raise InputError(f"no ImageNet weights of {network} in {folder}", needed, action)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a torch file read with weights_only=True.

    A file of slices, as a sharded run's checkpoints have them (NAME.1-of-8.safetensors), is joined
    with its like. Raises InputError when the file is missing, unreadable, or holds anything but
    tensors by name.
    """
    path = Path(path)
    action = "check the path after segmentor.init=, or write segmentor.init=random"
    if not path.is_file():
        raise InputError(f"no file of weights at {path}", "a .safetensors or .pth file", action)
    is_safetensors = path.suffix == ".safetensors"
    try:
        state = _joined(path) if is_safetensors else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} cannot be read: {reason}", "a state dict of tensors only", action
        ) from None
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise InputError(f"{path} holds no state dict", "tensors by name", action)
    return dict(state)


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


def load_segmentor(segmentor: nn.Module, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Load a whole segmentor's weights, its encoder's, or those of AdvSemiSeg's DeepLabV2; see
    load_into.

    Of the latter, atrous classifiers for another number of classes are left out and reported: its
    COCO start has them. Raises InputError, too, when an encoder's `layout` is not the one that the
    weights were trained with.
    """
    own = segmentor.state_dict()
    names = _advsemiseg_names(state)
    layout = getattr(segmentor.encoder, "layout", None)
    origin = "caffe" if names else "torchvision" if "fc.weight" in state else None
    if layout and origin and layout != origin:
        got = (
            f"{source}: weights trained in the {origin} layout, for a network in the {layout} "
            "layout"
        )
        action = (
            f"choose another file, or deeplabv2_resnet101 with segmentor.options.layout={origin}"
        )
        raise InputError(got, "one layout (where a bottleneck has its stride)", action)
    if not names:
        is_whole = any(key.startswith("encoder.") for key in state)
        network = segmentor if is_whole else segmentor.encoder
        return load_into(network, state, source)  # type: ignore[arg-type]
    renamed = {new: state[old] for new, old in names.items()}
    for key in [key for key in renamed if key.startswith("aspp.") and key in own]:
        if (
            renamed[key].shape[:1] != own[key].shape[:1]
            and renamed[key].shape[1:] == own[key].shape[1:]
        ):
            del renamed[key]
    report = load_into(segmentor, renamed, source)
    taken = {names[key] for key in report.loaded}
    return replace(report, left_over=tuple(key for key in state if key not in taken))


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy every tensor of `state` whose key the module has; the rest of both sides goes into the
    report.

    A fully connected weight (out, in) fits a convolution (out, C, k, k) with C * k * k = in, as
    when VGG's classifier is made convolutional. Raises InputError when shapes differ otherwise, or
    no key fits.
    """
    own = module.state_dict()
    loaded = tuple(key for key in own if key in state)
    if not loaded:
        got = f"{source}: none of its keys fits ({_some(tuple(state))})"
        raise InputError(got, f"keys like {_some(tuple(own))}", "choose the file of this network")
    for key in loaded:
        if state[key].shape != own[key].shape and not _is_flat_convolution(state[key], own[key]):
            got = f"{source}: {key} has shape {tuple(state[key].shape)}"
            raise InputError(
                got, f"shape {tuple(own[key].shape)}", "choose the file of this network"
            )
    module.load_state_dict(
        {key: state[key].reshape(own[key].shape) for key in loaded}, strict=False
    )
    return LoadReport(
        source=source,
        loaded=loaded,
        missing=tuple(
            key for key in own if key not in state and not key.endswith("num_batches_tracked")
        ),
        left_over=tuple(key for key in state if key not in own),
    )


def _advsemiseg_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """DeepLabV2's keys -> the keys of a file in the layout of AdvSemiSeg and its forebears; empty
    for other files.

    Their atrous classifiers are called layer5; files converted from Caffe have "Scale." before
    every key.
    """
    names = {}
    for key in state:
        name = key.removeprefix("Scale.")
        is_classifier = name.startswith("layer5.conv2d_list.")
        names[
            name.replace("layer5.conv2d_list", "aspp") if is_classifier else f"encoder.{name}"
        ] = key
    return names if any(key.startswith("aspp.") for key in names) else {}


def _is_flat_convolution(given: Tensor, own: Tensor) -> bool:
    return given.ndim == 2 and own.ndim == 4 and given.shape == own.flatten(1).shape


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
