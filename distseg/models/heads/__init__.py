"""Heads that stand on any encoder, by name."""

from __future__ import annotations

from distseg.models.heads.linear import Linear
from distseg.models.heads.segformer import SegFormer
from distseg.models.heads.upernet import UPerNet
from distseg.models.levels import Head

HEADS: dict[str, type[Head]] = {
    "linear": Linear,
    "segformer": SegFormer,
    "upernet": UPerNet,
}
