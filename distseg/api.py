"""A trained run as an object: `distseg.load(run_dir)` labels images and scores splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks
from distseg.evaluate.class_map import Wanted
from distseg.evaluate.judged import confidence_map
from distseg.evaluate.run import check_overrides, evaluator_of, open_samples
from distseg.evaluate.trained import trained_classes, trained_discriminator, trained_segmentor
from distseg.predict.run import (
    PredictOptions,
    choose_device,
    image_probabilities,
    of_run,
)
from distseg.runs.checkpoint import Checkpoint
from shards.errors import InputError
from shards.images import load_rgb
from shards.sample import IGNORE_INDEX, ClassSet

# (H, W, 3) uint8 RGB, or the path of a picture
Image = np.ndarray | str | Path


def load(run_dir: str | Path, checkpoint: str | int = "last", device: str = "auto") -> Trained:
    """The segmentor of a run's checkpoint, ready to use; its EMA weights where the run has them.

    checkpoint: "last", "best" or a step. device: auto, cpu or cuda. Raises InputError where there
    is no such run, checkpoint or device.
    """
    # before the checkpoint is read, which takes longer than to see that a device is missing
    where = choose_device(device)
    network, config, found = trained_segmentor(Path(run_dir), str(checkpoint))
    # the classes from the checkpoint: the shards may be on another machine
    return Trained(network.to(where), config, found, where, trained_classes(found))


@dataclass(frozen=True)
class Trained:
    """A trained segmentor with what it needs: its configuration, its classes and a device."""

    network: nn.Module  # in evaluation mode: (N, 3, H, W) in [0, 1] -> logits at its own stride
    config: Config
    checkpoint: Checkpoint
    device: torch.device
    class_set: ClassSet

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by index."""
        return self.class_set.names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Their colours, RGB from 0 to 255."""
        return self.class_set.palette

    @property
    def path(self) -> Path:
        """Of the checkpoint, which may have been pruned since: all of it has been read."""
        return self.checkpoint.path

    @property
    def step(self) -> int:
        """Steps that it was trained for."""
        return self.checkpoint.step

    def predict(self, image: Image) -> np.ndarray:
        """The class of every pixel, (H, W) uint8: what `distseg predict` writes.

        image: (H, W, 3) uint8 RGB, or a path, whose picture is turned as its EXIF orientation says.
        Raises InputError for another form of array, and for a file that is not a picture.
        """
        return self._probabilities(image).argmax(0).to(torch.uint8).cpu().numpy()

    def probabilities(self, image: Image) -> np.ndarray:
        """(C, H, W) float32, sums to 1 over C; `image` as in `predict`."""
        return self._probabilities(image).cpu().numpy()

    @cached_property
    def discriminator(self) -> nn.Module:
        """The run's discriminator in evaluation mode: (image, *label maps) -> a logit per map.

        Raises InputError for a run without one.
        """
        # when it is asked for: most who load a run want the segmentor alone
        return trained_discriminator(self.config, self.checkpoint).to(self.device)

    def confidence(self, image: Image, mask: np.ndarray | None = None) -> np.ndarray:
        """How real the run's discriminator takes a mask of an image to be, at every pixel.

        image: as in `predict`. mask: (H, W) uint8 class indices of the image's size, seen as ground
        truth is in training: one-hot, or softened where loss.real_map=scaling, and at 255 = void
        what the segmentor says; None: the segmentor's own probabilities. Returns (H, W) float32,
        the probability of being real (of loss.adv_form=hinge the sigmoid of the score, which is
        none); one value throughout where the discriminator judges the image as a whole. Raises
        InputError for a run without a discriminator, for a mask of another form, and for any where
        it tells domains apart (mode=domain_adaptation).
        """
        image = self._pixels(image)
        label = None if mask is None else self._label(mask, image)
        return confidence_map(self.network, self.discriminator, self.config, image, label)

    def evaluate(
        self,
        overrides: Sequence[str] = (),
        *,
        shards: str | Path | None = None,
        split: str | None = None,
        quick: bool = False,
        classes: Wanted | None = None,
    ) -> dict[str, Any]:
        """Scores of a split, as `distseg evaluate` finds them and evaluation*.json holds them.

        overrides: its arguments, ["evaluate.scales=[0.75,1]"]. shards, split: the run's own where
        not given. quick: without outlines, calibration and intervals. classes: which of the data's
        the run's are, {"car": "vehicle", "truck": "vehicle", "sky": None, None: ["tunnel"]}; where
        not given, by name (distseg/evaluate/class_map.py). Writes nothing. Where the
        caller has a process group, it shares the images over it and is called on every rank, each
        with the device that the group's collectives take; else this process scores all of them.
        Returns {"val/mean_iou": ..., "val/iou/<class>": ..., "confusion": ..., ...}; None for the
        score of an absent class. Raises InputError for a key that belongs to training, and for
        shards of other classes.
        """
        chosen = loading.words(overrides)
        chosen += [f"data.shards={shards}"] if shards is not None else []
        chosen += [f"data.val_split={split}"] if split is not None else []
        # the same rules as for the command, or a score from here could not be compared with one
        # from there
        check_overrides(chosen)
        config = loading.override(self.config, loading.of_validation(chosen))
        samples = open_samples(config, self.checkpoint, classes)
        rank, world_size = 0, 1
        # a group of the caller's own is used and left alone, without another one beside it
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        ranks = Ranks(rank, world_size, 0, self.device)
        parts = (self.network, config, self.checkpoint, samples, ranks)
        evaluator = evaluator_of(*parts, wanted=classes)
        evaluator.details = not quick
        # writes nothing: the run's directory may be read-only, and belongs to the run
        evaluator()
        return evaluator.report(self.step)

    def _probabilities(self, image: Image) -> torch.Tensor:
        # as the run evaluates, so that pictures and scores are of the same probabilities
        options = of_run(PredictOptions(), self.config, self.device)
        return image_probabilities(self.network, self._pixels(image), options)

    def _pixels(self, image: Image) -> np.ndarray:
        if not isinstance(image, np.ndarray | str | Path):
            got, needed = f"an image of type {type(image).__name__}", "a NumPy array, or a path"
            raise InputError(
                got, f"{needed}: (H, W, 3) uint8 RGB", "convert it, as np.asarray does"
            )
        return image if isinstance(image, np.ndarray) else load_rgb(Path(image))

    def _label(self, mask: np.ndarray, image: np.ndarray) -> torch.Tensor:
        """The mask as a tensor. Raises InputError for another form, and for other values."""
        if mask.shape != image.shape[:2] or mask.dtype != np.uint8:
            got = f"a mask of shape {mask.shape} and type {mask.dtype}"
            raise InputError(got, f"{image.shape[:2]} uint8, as the image is", "convert it")
        num_classes = self.class_set.num_classes
        wrong = mask[(mask >= num_classes) & (mask != IGNORE_INDEX)]
        if wrong.size:
            got = f"a mask with {int(wrong.max())} in it"
            raise InputError(got, f"0 to {num_classes - 1}, or 255 for void", "correct the mask")
        return torch.from_numpy(mask.copy())
