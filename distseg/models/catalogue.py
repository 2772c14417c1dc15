"""What there is to choose from, measured: `distseg models` prints every segmentor and discriminator
with its size.

No number is written down here. Networks are built on the meta device, which has shapes but no
memory, so that even VGG16 costs nothing; parameters are counted on the module, floating point
operations by torch's FlopCounterMode, strides and fields of view by `distseg.models.connections`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distseg.models import DISCRIMINATORS, SEGMENTORS, build_discriminator, build_segmentor
from distseg.models.connections import Filled, Forward, geometry
from shards.errors import InputError

SIZE_PX = 321  # of the images whose work is counted: the crop of Hung et al. 2018
# of the smaller label maps that discriminators are counted on: Dilated-8's and DeepLab-v2's
LABEL_STRIDE = 8
STRIDED_PX = -(-SIZE_PX // LABEL_STRIDE)
MIN_WIDTH = 112  # of the tables, in characters: narrower ones would cut numbers off
NOTE = f"""\
stride, view   of one logit, in px of what is judged: the image, or the label map \
(of which head=patch gives many)
GFLOP          10^9 operations of a forward, a multiply-add counted as two, of convolutions alone; \
the image has
               {SIZE_PX}x{SIZE_PX} px, the label map as many (1/1) \
or {STRIDED_PX}x{STRIDED_PX} (1/{LABEL_STRIDE})"""


@dataclass(frozen=True)
class Entry:
    """One network. Fields of view are (height, width) px of the image, or of the label map for a
    discriminator.
    """

    name: str
    parameters: int
    output_stride: int
    # of the logit in the middle; None: the whole image, whatever its size
    field_of_view_px: tuple[int, int] | None
    # a forward of one image of 321x321 px, for a discriminator with a label map of that size
    gflop: float
    encoder: str | None = None  # segmentors
    encoder_parameters: int | None = None
    # discriminators: with a label map of 41x41 px, the same image
    gflop_at_stride_8: float | None = None


def run(names: Iterable[str], num_classes: int, as_json: bool) -> int:
    """`distseg models`: print the table, or JSON, of all networks or of `names`; returns the exit
    code.

    Raises InputError for an unknown name, and for a number of classes outside 1 to 255.
    """
    segmentors, discriminators = measure(tuple(names), num_classes)
    if as_json:
        kinds = {"segmentors": segmentors, "discriminators": discriminators}
        document = {kind: [asdict(entry) for entry in entries] for kind, entries in kinds.items()}
        print(json.dumps({"num_classes": num_classes, "size_px": SIZE_PX, **document}, indent=2))
        return 0
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    if segmentors:
        console.print(_segmentor_table(segmentors, num_classes))
    if discriminators:
        console.print(_discriminator_table(discriminators, num_classes))
    console.print(NOTE, highlight=False, soft_wrap=True)
    return 0


def measure(names: tuple[str, ...] = (), num_classes: int = 21) -> tuple[list[Entry], list[Entry]]:
    """The segmentors and the discriminators among `names` (none: all), with their default options.

    Raises InputError for an unknown name, and for a number of classes outside 1 to 255.
    """
    for name in names:
        if name not in SEGMENTORS and name not in DISCRIMINATORS:
            known = ", ".join([*SEGMENTORS, *DISCRIMINATORS])
            raise InputError(
                f"no network {name}", f"among: {known}", "correct the name, or give none for all"
            )
    return (
        [measure_segmentor(name, num_classes) for name in SEGMENTORS if not names or name in names],
        [
            measure_discriminator(name, num_classes)
            for name in DISCRIMINATORS
            if not names or name in names
        ],
    )


def measure_segmentor(name: str, num_classes: int, **options: Any) -> Entry:
    """A segmentor built with `options`."""
    with torch.device("meta"):
        network = build_segmentor(name, num_classes, init="random", **options).eval()

    def forward(module: nn.Module, image: Tensor) -> Tensor:
        return module(image)

    encoder = type(network.encoder).__name__
    stride, field_of_view_px = geometry(network, forward, 3)
    return Entry(
        name=name,
        parameters=num_parameters(network),
        output_stride=stride,
        field_of_view_px=field_of_view_px,
        gflop=gflop(network, forward, (3, SIZE_PX)),
        encoder="own" if encoder in vars(nn) else encoder,
        encoder_parameters=num_parameters(network.encoder),
    )


def measure_discriminator(name: str, num_classes: int, **options: Any) -> Entry:
    """A discriminator built with `options`, and with head="patch" where it has heads.

    Of a mean there is no field.
    """
    if "head" in inspect.signature(DISCRIMINATORS[name]).parameters:
        options = {"head": "patch", **options}
    with torch.device("meta"):
        network = build_discriminator(name, num_classes, **options).eval()

    def forward(module: nn.Module, label_map: Tensor) -> Tensor:
        image = torch.ones(1, 3, SIZE_PX, SIZE_PX, dtype=label_map.dtype, device=label_map.device)
        return module(image, label_map)[0]

    stride, field_of_view_px = geometry(network, forward, num_classes)
    return Entry(
        name=name,
        parameters=num_parameters(network),
        output_stride=stride,
        field_of_view_px=field_of_view_px,
        gflop=gflop(network, forward, (num_classes, SIZE_PX)),
        gflop_at_stride_8=gflop(network, forward, (num_classes, STRIDED_PX)),
    )


def num_parameters(network: nn.Module) -> int:
    """All of them, trained or frozen; shared ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def gflop(network: nn.Module, forward: Forward, channels_and_size: tuple[int, int]) -> float:
    """10^9 operations of one forward, a multiply-add counted as two.

    `network` is on the meta device.
    """
    channels, size = channels_and_size
    counter = FlopCounterMode(display=False)
    # fake tensors, which call themselves CPU tensors: under autocast the meta device is refused
    with FakeTensorMode(), torch.no_grad(), counter:
        forward(Filled(network, torch.empty), torch.empty(1, channels, size, size))
    return counter.get_total_flops() / 1e9


def _segmentor_table(entries: list[Entry], num_classes: int) -> Table:
    table = _table(f"Segmentors, {num_classes} classes", ("segmentor", "encoder"))
    for column in ("parameters", "of encoder", "stride", "view", "GFLOP"):
        table.add_column(column, justify="right")
    for entry in entries:
        parameters, of_encoder = f"{entry.parameters:,}", f"{entry.encoder_parameters:,}"
        view, work = _view(entry.field_of_view_px), f"{entry.gflop:.1f}"
        table.add_row(
            entry.name, entry.encoder, parameters, of_encoder, str(entry.output_stride), view, work
        )
    return table


def _discriminator_table(entries: list[Entry], num_classes: int) -> Table:
    table = _table(f"Discriminators, {num_classes} classes", ("discriminator",))
    for column in ("parameters", "stride", "view", "GFLOP 1/1", f"GFLOP 1/{LABEL_STRIDE}"):
        table.add_column(column, justify="right")
    for entry in entries:
        parameters, view = f"{entry.parameters:,}", _view(entry.field_of_view_px)
        work = f"{entry.gflop:.1f}", f"{entry.gflop_at_stride_8:.2f}"
        table.add_row(entry.name, parameters, str(entry.output_stride), view, *work)
    return table


def _table(title: str, text_columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in text_columns:
        table.add_column(column, no_wrap=True)
    return table


def _view(field_of_view_px: tuple[int, int] | None) -> str:
    return "image" if field_of_view_px is None else f"{field_of_view_px[0]}x{field_of_view_px[1]}"
