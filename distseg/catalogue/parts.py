"""The parts that segmentors named HEAD_ENCODER are composed of, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from distseg.catalogue.measuring import SIZE_PX, gflop, num_parameters, table
from distseg.models import ENCODERS, build_segmentor
from distseg.models.levels import Encoder, Level
from shards.words import counted

EXAMPLE = "vitb14"  # the encoder that heads are measured on


@dataclass(frozen=True)
class EncoderEntry:
    """One encoder; gflop: a forward of an image of 321x321 px, or the next whole cells."""

    name: str
    kind: str
    parameters: int
    levels: tuple[Level, ...]
    gflop: float


@dataclass(frozen=True)
class HeadEntry:
    """One head, on the encoder EXAMPLE; gflop: its own."""

    name: str
    parameters: int
    output_stride: int
    gflop: float


def measure_encoder(name: str) -> EncoderEntry:
    """An encoder with its default options."""
    entry = ENCODERS[name]
    with torch.device("meta"):
        encoder = entry.make(**entry.size).eval()
    work = gflop(encoder, _forward, (3, _whole_cells(encoder)))
    kind = type(encoder).__name__
    return EncoderEntry(name, kind, num_parameters(encoder), encoder.levels, work)


def measure_head(name: str, num_classes: int) -> HeadEntry:
    """A head on the encoder EXAMPLE, with its default options."""
    with torch.device("meta"):
        network = build_segmentor(f"{name}_{EXAMPLE}", num_classes, init="random").eval()
    encoder = network.encoder
    assert isinstance(encoder, Encoder)
    side = _whole_cells(encoder)
    # by the difference, as a head alone cannot be asked: it needs maps
    work = gflop(network, _forward, (3, side)) - gflop(encoder, _forward, (3, side))
    number = num_parameters(network) - num_parameters(encoder)
    return HeadEntry(name, number, network.output_stride, work)


def _whole_cells(encoder: Encoder) -> int:
    """The side of the image, brought up to a multiple of the coarsest stride."""
    stride = max(level.stride for level in encoder.levels)
    return -(-SIZE_PX // stride) * stride


def _forward(network: nn.Module, image: Tensor) -> Any:
    return network(image)


def encoder_table(entries: list[EncoderEntry]) -> Table:
    """A row for each encoder."""
    rows = table("Encoders, of segmentors HEAD_ENCODER", ("encoder", "kind", "channels at stride"))
    for column in ("parameters", "GFLOP"):
        rows.add_column(column, justify="right")
    for entry in entries:
        levels = [f"{channels} at {stride}" for channels, stride in dict.fromkeys(entry.levels)]
        number, work = f"{entry.parameters:,}", f"{entry.gflop:.1f}"
        rows.add_row(entry.name, entry.kind, ", ".join(levels), number, work)
    return rows


def head_table(entries: list[HeadEntry], num_classes: int) -> Table:
    """A row for each head."""
    classes = counted(num_classes, "class", "classes")
    rows = table(f"Heads, on {EXAMPLE}, {classes}", ("head",))
    for column in ("parameters", "stride", "GFLOP"):
        rows.add_column(column, justify="right")
    for entry in entries:
        number = f"{entry.parameters:,}"
        rows.add_row(entry.name, number, str(entry.output_stride), f"{entry.gflop:.1f}")
    return rows
