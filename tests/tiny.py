"""Settings of runs that take a second, for tests of what is around the networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distseg.models.encoders import Entry

SETTINGS = {
    "segmentor": {"name": "multiscale", "init": "random", "options": {"norm": "batch"}},
    "discriminator": {"options": {"width": 0.125}},
    "data": {"crop_px": 48, "num_threads": 1},
    "tracking": {"wandb": "disabled", "log_every": 1},
    "evaluate": {"num_pictures": 0},
    "schedule": {"name": "constant"},
    "segmentor_optimizer": {"lr": 1e-3},
    "batch_size": 4,
    "steps": 2,
    "ema_decay": 0.9,
    "precision": "fp32",
    "device": "cpu",
}
SETTINGS["segmentor"]["options"]["hidden"] = 8  # type: ignore[index]

# of distseg.models.vgg, with few channels but where heads take them: the same operations
NARROW_VGG = (8, 8, "P", 8, 8, "P", 8, 8, 256, "P", 8, 8, 512, "P", 8, 8, 16, "P")
# for runs of tests/test_train.py that are not about networks or pictures
OVERRIDES = ["segmentor=multiscale", "segmentor.options.norm=batch", "segmentor.options.hidden=16"]
OVERRIDES += ["data.crop_px=32", "evaluate.num_pictures=0"]


def contents(folder: Path, pattern: str = "*.safetensors") -> dict[str, bytes]:
    """The bytes of all tensors of a checkpoint, by file."""
    files = {file.name: file.read_bytes() for file in sorted(folder.glob(pattern))}
    assert files, f"nothing in {folder}"
    return files


@contextmanager
def no_curves() -> Iterator[None]:
    """Runs draw no curves, which takes longer than their steps; for the length of a block, or, as a
    decorator, of a function.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("distseg.train.showcase.draw_scores", lambda *_: None)
        yield


def narrow_encoder(encoder: Entry) -> Entry:
    """An encoder with four small blocks: of a transformer each is given to heads, of another each
    is a stage.
    """
    size = encoder.size["size"]
    if is_dataclass(size):
        size = replace(size, dim=24, depth=4, num_heads=3, layers=(0, 1, 2, 3), grid=3)
    else:
        size = size._replace(channels=(16, 32, 40, 64), depths=(1, 1, 1, 1))
    return replace(encoder, size={"size": size})


def every_part(heads: Iterable[str], encoders: Sequence[str]) -> list[str]:
    """Segmentors HEAD_ENCODER in which every head is, and every encoder once."""
    return [f"{h}_{e}" for h, e in zip(itertools.cycle(heads), encoders, strict=False)]
