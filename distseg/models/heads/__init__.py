"""Heads that stand on any encoder, by name."""

from __future__ import annotations

from distseg.models.heads.dpt import DPT
from distseg.models.heads.linear import Linear, MultiLevel
from distseg.models.heads.segformer import SegFormer
from distseg.models.heads.upernet import UPerNet
from distseg.models.levels import Head

HEADS: dict[str, type[Head]] = {
    "linear": Linear,
    "multilevel": MultiLevel,
    "dpt": DPT,
    "segformer": SegFormer,
    "upernet": UPerNet,
}
