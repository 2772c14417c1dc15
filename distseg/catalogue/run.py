"""What there is to choose from, measured: `distseg models` prints every segmentor and discriminator
with its size.

No number is written down here. Networks are built on the meta device, which has shapes but no
memory, so that even VGG16 costs nothing; parameters are counted on the module, floating point
operations by torch's FlopCounterMode, strides and fields of view by `distseg.models.connections`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distseg.catalogue.measuring import SIZE_PX, gflop, num_parameters, table
from distseg.catalogue.parts import encoder_table, head_table, measure_encoder, measure_head
from distseg.models import (
    COMPOSITIONS,
    DISCRIMINATORS,
    ENCODERS,
    HEADS,
    SEGMENTORS,
    build_discriminator,
    build_segmentor,
)
from distseg.models.connections import Forward, geometry
from shards import user_code
from shards.errors import InputError
from shards.files import tracked
from shards.words import counted

# of the smaller label maps that discriminators are counted on: Dilated-8's and DeepLab-v2's
LABEL_STRIDE = 8
STRIDED_PX = -(-SIZE_PX // LABEL_STRIDE)
UNKNOWN = (0, 0)  # a field of view
MIN_WIDTH = 112  # of the tables, in characters: narrower ones would cut numbers off
NOTE = f"""\
stride, view   of one logit, in px of what is judged: the image, or the label map \
(of which head=patch gives many)
GFLOP          10^9 operations of a forward, a multiply-add counted as two, of convolutions and \
matrix
               products; the image has {SIZE_PX}x{SIZE_PX} px, the label map as many (1/1) \
or {STRIDED_PX}x{STRIDED_PX} (1/{LABEL_STRIDE})"""


@dataclass(frozen=True)
class Entry:
    """One network. Fields of view are (height, width) px of the image, or of the label map for a
    discriminator.
    """

    name: str
    parameters: int
    output_stride: int
    # of the logit in the middle; None: the whole image, whatever its size; UNKNOWN
    field_of_view_px: tuple[int, int] | None
    # a forward of one image of 321x321 px, for a discriminator with a label map of that size
    gflop: float | None
    encoder: str | None = None  # segmentors
    encoder_parameters: int | None = None
    # discriminators: with a label map of 41x41 px, the same image
    gflop_at_stride_8: float | None = None


def run(names: Iterable[str], num_classes: int, as_json: bool) -> int:
    """`distseg models`: print the table, or JSON, of all networks or of `names`; returns the exit
    code.

    Raises InputError for an unknown name, and for a number of classes outside 1 to 255.
    """
    found = measure(tuple(names), num_classes)
    if as_json:
        document: dict[str, Any] = {"num_classes": num_classes, "size_px": SIZE_PX}
        document |= {kind: list(map(asdict, entries)) for kind, entries in found.items()}
        print(json.dumps(document, indent=2))
        return 0
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    if found["segmentors"]:
        console.print(_segmentor_table(found["segmentors"], num_classes))
    if found["encoders"]:
        console.print(encoder_table(found["encoders"]))
        console.print(head_table(found["heads"], num_classes))
    if found["discriminators"]:
        console.print(_discriminator_table(found["discriminators"], num_classes))
    console.print(NOTE, highlight=False, soft_wrap=True)
    return 0


def measure(names: tuple[str, ...] = (), num_classes: int = 21) -> dict[str, list[Any]]:
    """What `names` chooses, measured with default options: entries under "segmentors", "encoders",
    "heads" and "discriminators", with a bar while it takes its time.

    No names: all, and of the segmentors that are a head on an encoder their parts. Raises
    InputError for an unknown name, and for a number of classes outside 1 to 255.
    """
    segmentors, discriminators = _chosen(names)
    of_classes: dict[str, Any] = {"num_classes": num_classes}
    work: dict[str, tuple[Callable[[str], Any], Iterable[str]]] = {
        "segmentors": (partial(measure_segmentor, **of_classes), segmentors),
        "encoders": (measure_encoder, () if names else ENCODERS),
        "heads": (partial(measure_head, **of_classes), () if names else HEADS),
        "discriminators": (partial(measure_discriminator, **of_classes), discriminators),
    }
    tasks = [(kind, name) for kind, (_, every) in work.items() for name in every]
    found: dict[str, list[Any]] = {kind: [] for kind in work}
    # minutes for all of them on a busy machine
    for kind, name in tracked(tasks, len(tasks), "measuring networks"):
        found[kind].append(work[kind][0](name))
    return found


def _chosen(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The segmentors and the discriminators among `names`.

    The name of a head, or of an encoder: all segmentors of it.
    One of the user's own is named as in training: segmentor=FILE.py:NAME, discriminator=... Raises
    InputError for an unknown name.
    """
    own: dict[str, list[str]] = {"segmentor": [], "discriminator": []}
    whole = [name for name in SEGMENTORS if name not in COMPOSITIONS]
    for name in names:
        kind, _, reference = name.partition("=")
        if kind in own and user_code.is_reference(reference):
            own[kind].append(reference)
        elif not any(name in known for known in (SEGMENTORS, DISCRIMINATORS, HEADS, ENCODERS)):
            known = ", ".join([*whole, *HEADS, *ENCODERS, *DISCRIMINATORS])
            action = "correct the name, give none for all, or your own as segmentor=FILE.py:NAME"
            raise InputError(f"no network {name}", f"among: {known}", action)
    segmentors = [name for name in whole if not names or name in names]
    for name, made in COMPOSITIONS.items():
        if {name, made.head, made.encoder} & set(names):
            segmentors.append(name)
    discriminators = [name for name in DISCRIMINATORS if not names or name in names]
    return [*segmentors, *own["segmentor"]], [*discriminators, *own["discriminator"]]


def measure_segmentor(name: str, num_classes: int, **options: Any) -> Entry:
    """A segmentor built with `options`."""
    with _place(name):
        network = build_segmentor(name, num_classes, init="random", **options).eval()

    def forward(module: nn.Module, image: Tensor) -> Tensor:
        return module(image)

    encoder = network.encoder
    kind = None if encoder is None else type(encoder).__name__
    stride, field_of_view_px = _geometry(name, network, forward, 3)
    return Entry(
        name=user_code.short(name),
        parameters=num_parameters(network),
        output_stride=stride,
        field_of_view_px=field_of_view_px,
        gflop=_gflop(name, network, forward, (3, SIZE_PX)),
        # the encoder of a user's network may be a plain nn.Sequential, whose class says nothing
        encoder="own" if kind in vars(nn) else kind,
        encoder_parameters=None if encoder is None else num_parameters(encoder),
    )


def measure_discriminator(name: str, num_classes: int, **options: Any) -> Entry:
    """A discriminator built with `options`, and with head="patch" where it has heads.

    Of a mean there is no field.
    """
    has_heads = name in DISCRIMINATORS and "head" in user_code.parameters(DISCRIMINATORS[name])
    if has_heads:
        # with one score per image the field would be the whole image, whatever the layers
        options = {"head": "patch", **options}
    with _place(name):
        network = build_discriminator(name, num_classes, **options).eval()

    def forward(module: nn.Module, label_map: Tensor) -> Tensor:
        # only there to be asked for: what is followed back is the label map
        image = torch.ones(1, 3, SIZE_PX, SIZE_PX, dtype=label_map.dtype, device=label_map.device)
        return module(image, label_map)[0]

    stride, field_of_view_px = _geometry(name, network, forward, num_classes)
    return Entry(
        name=user_code.short(name),
        parameters=num_parameters(network),
        output_stride=stride,
        field_of_view_px=field_of_view_px,
        gflop=_gflop(name, network, forward, (num_classes, SIZE_PX)),
        gflop_at_stride_8=_gflop(name, network, forward, (num_classes, STRIDED_PX)),
    )


def _place(name: str) -> AbstractContextManager[Any]:
    """Where a network is built: one of the user's own is tried, which needs values."""
    return nullcontext() if user_code.is_reference(name) else torch.device("meta")


@torch.no_grad()
def _geometry(
    name: str, network: nn.Module, forward: Forward, channels: int
) -> tuple[int, tuple[int, int] | None]:
    """As `geometry`; of the user's own that the stand-ins cannot follow, the view is UNKNOWN."""
    try:
        # the view is followed back by a gradient; all else here needs none
        with torch.enable_grad():
            return geometry(network, forward, channels)
    except Exception:
        if not user_code.is_reference(name):
            raise
        side = max(128, int(network.min_size_px))  # type: ignore[arg-type]
        # measured once at a plain size: stand-ins cannot follow operators that they do not know
        return side // forward(network, torch.rand(1, channels, side, side)).shape[-1], UNKNOWN


def _gflop(
    name: str, network: nn.Module, forward: Forward, channels_and_size: tuple[int, int]
) -> float | None:
    """As `gflop`; None for one of the user's own that does not run without values."""
    try:
        return gflop(network, forward, channels_and_size)
    except Exception:
        if not user_code.is_reference(name):
            raise
        return None


def _segmentor_table(entries: list[Entry], num_classes: int) -> Table:
    rows = table(
        f"Segmentors, {counted(num_classes, 'class', 'classes')}", ("segmentor", "encoder")
    )
    for column in ("parameters", "of encoder", "stride", "view", "GFLOP"):
        rows.add_column(column, justify="right")
    for entry in entries:
        parameters, of_encoder = f"{entry.parameters:,}", f"{entry.encoder_parameters or 0:,}"
        view, work = _view(entry.field_of_view_px), _number(entry.gflop, 1)
        rows.add_row(
            entry.name,
            entry.encoder or "-",
            parameters,
            of_encoder,
            str(entry.output_stride),
            view,
            work,
        )
    return rows


def _discriminator_table(entries: list[Entry], num_classes: int) -> Table:
    rows = table(f"Discriminators, {counted(num_classes, 'class', 'classes')}", ("discriminator",))
    for column in ("parameters", "stride", "view", "GFLOP 1/1", f"GFLOP 1/{LABEL_STRIDE}"):
        rows.add_column(column, justify="right")
    for entry in entries:
        parameters, view = f"{entry.parameters:,}", _view(entry.field_of_view_px)
        work = _number(entry.gflop, 1), _number(entry.gflop_at_stride_8, 2)
        rows.add_row(entry.name, parameters, str(entry.output_stride), view, *work)
    return rows


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _view(field_of_view_px: tuple[int, int] | None) -> str:
    if field_of_view_px == UNKNOWN:
        return "?"
    return "image" if field_of_view_px is None else f"{field_of_view_px[0]}x{field_of_view_px[1]}"
