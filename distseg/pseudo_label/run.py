"""Self-training in stages: a run labels its unlabelled images, as the data of the next run.

As ST++ (Yang et al. 2022) and DMT (Feng et al. 2022) do it, with the surest images first.
"""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distseg.config import loading
from distseg.config.schema import Config, DataConfig
from distseg.data.samples import LABELLED_FILE, SampleSet, open_reader, split_labelled
from distseg.distributed.ranks import Ranks
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.evaluate.judged import confidence_map
from distseg.evaluate.run import as_trained, check_place
from distseg.evaluate.trained import trained_classes, trained_discriminator, trained_segmentor
from distseg.predict.run import choose_device
from distseg.runs.checkpoint import Checkpoint
from shards.errors import InputError
from shards.files import check_writable, nearest_existing, published, say, tracked
from shards.maps import write_maps
from shards.reader import ShardReader
from shards.sample import IGNORE_INDEX, Sample, decode_label, encode_label
from shards.storage import is_file
from shards.words import IS, counted


@dataclass(frozen=True)
class Choice:
    """Which predictions become labels.

    threshold: of a pixel's largest probability, from 0 to 1; below it is void. keep: share of the
    images, above 0 and at most 1, the surest. rank: surest by "confidence", the mean of the pixels'
    largest probabilities, or by "discriminator", the mean probability of being real. compare:
    labels that the shards have of these images are read, to be compared with and nothing else.
    """

    threshold: float = 0.9
    keep: float = 1.0
    rank: str = "confidence"
    compare: bool = False

    def __post_init__(self) -> None:
        # NaN is in no interval
        if not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold {self.threshold}", "0 to 1", "correct --threshold")
        if not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep}", "above 0 and at most 1", "correct --keep")


@dataclass
class Labelled:
    """An unlabelled image as the segmentor labels it.

    label: the encoded (H, W) uint8, as all of them wait for the ranking. confidence, labelled: mean
    of its pixels' largest probabilities, share of pixels that are not void. realness: of the
    discriminator, NaN where it is not asked. agreement: share of the labelled pixels that have the
    shards' own class, NaN where that is not known. counts: (3, classes) of those: their pixels, how
    many are labelled, and how many of these agree; None where that is not known.
    """

    index: int
    key: str
    label: bytes
    confidence: float
    labelled: float
    realness: float = math.nan
    agreement: float = math.nan
    counts: np.ndarray | None = None


def run(
    run_dir: Path,
    out: Path,
    choice: Choice,
    *,
    which: str,
    device: str,
    overrides: Sequence[str],
) -> int:
    """`distseg pseudo-label RUN --out FILE.h5`: write maps of a data set that is labelled
    throughout, and a table of the images that the run has labelled.

    Raises InputError for a run that used the labels of all images, shards of other classes than the
    run's, a split that is validated on, and for a place that cannot be written.
    """
    _check_out(out, choice)
    where = choose_device(device)
    loading.refuse_others(list(overrides), lambda key: key.at_evaluation)
    network, config, found = trained_segmentor(run_dir, which)
    trained, config = config, loading.override(config, list(overrides))
    data = Data(run_dir, config, found)
    data.check_unscored(trained.data, found)
    labeller = Labeller(network, config, found, choice, where)
    count = len(data.unlabelled)
    images = [labeller(data, index) for index in tracked(range(count), count, "labelling")]
    kept = surest(images, choice)
    _check_labelled(images, kept, choice)
    name = f"{data.reader.manifest.name}-pseudo"
    samples = data.samples(kept, origin_of(run_dir, found, choice, labeller.look))
    write_maps(out, name, data.classes, samples, data.num_samples(kept))
    _write_table(out.with_suffix(".csv"), ranked(images, choice), kept)
    written = [str(out), out.with_suffix(".csv").name]
    if _draw_quality(kept, data.classes.names, out.with_suffix(".png")):
        written.append(out.with_suffix(".png").name)
    print(_told(images, kept, choice))
    print(f"wrote {', '.join(written[:-1])} and {written[-1]}")
    command = shlex.join(["pack", str(out), "--out", str(out.with_suffix(""))])
    print(f"next: distseg {command}")
    return 0


def ranked(images: Sequence[Labelled], choice: Choice) -> list[Labelled]:
    """The images, the surest first."""

    def rank(image: Labelled) -> tuple[float, int]:
        value = image.realness if choice.rank == "discriminator" else image.confidence
        return -value, image.index  # of equals the first, so that the choice is always the same

    return sorted(images, key=rank)


def surest(images: Sequence[Labelled], choice: Choice) -> list[Labelled]:
    """The images that are kept, in their order: the share that ranks highest, one at least.

    Without those that have no labelled pixel: they would be trained on for nothing.
    """
    number = max(1, round(choice.keep * len(images)))
    kept = [image for image in ranked(images, choice)[:number] if image.labelled]
    return sorted(kept, key=lambda image: image.index)


def origin_of(
    run_dir: Path, found: Checkpoint, choice: Choice, look: TestTimeAugmentation
) -> dict[str, Any]:
    """How pseudo-labels were made: enough to make them again."""
    checkpoint = {"run": run_dir.resolve().name, "step": found.step, "state_sha256": found.sha256}
    chosen = {"threshold": choice.threshold, "keep": choice.keep, "rank": choice.rank}
    return {"made_by": "pseudo-label"} | checkpoint | chosen | look.to_dict()


class Data:
    """The samples of a run: with labels, without, and to validate on."""

    def __init__(self, run_dir: Path, config: Config, found: Checkpoint):
        check_place(config, run_dir)
        options = config.data
        several = options.shards[1:] + options.unlabelled_shards
        if several or options.val_shards:
            # the new set is one of one: which classes and splits go where is not said of several
            others = [*options.shards, *options.unlabelled_shards, options.val_shards]
            got = f"a run of several data sets: {', '.join(filter(None, others))}"
            needed = "one that was trained on one, with data.labelled=1/8 of it"
            raise InputError(got, needed, "name another run")
        self._splits = options.train_split, options.val_split
        if options.train_split == options.val_split:
            needed = "images that nothing is scored on: a score on its own predictions says nothing"
            got = f"data.train_split and data.val_split, both {options.val_split!r}"
            raise InputError(got, needed, "write data.val_split=NAME")
        self.reader = open_reader(options, options.train_split)
        keep = options.keep_classes
        # first: of the images of other shards nothing is worth telling
        self.classes = SampleSet(self.reader, labelled=False, keep=keep).classes
        trained = trained_classes(found).names
        if self.classes.names != trained:
            got = f"shards with the classes {', '.join(self.classes.names)}"
            action = "name the shards that it was trained on: data.shards=DIR"
            raise InputError(got, f"the run's: {', '.join(trained)}", action)
        # the list that training drew, whatever a rule for drawing would draw today
        listed = run_dir / LABELLED_FILE
        choice = str(listed) if is_file(listed) else options.labelled
        with_label, without = split_labelled(self.reader, choice, options.labelled_seed)
        if not without:
            images = counted(len(with_label), "image")
            got = f"all {images} of {options.train_split} were used with their labels"
            needed = "a run with data.labelled=1/8, or shards with unlabelled images"
            raise InputError(got, needed, "name another run")
        self.labelled = SampleSet(self.reader, with_label, keep=keep)
        self.unlabelled = SampleSet(self.reader, without, labelled=False, keep=keep)
        self._without, self._keep = without, keep
        self.validation = SampleSet(open_reader(options, options.val_split), keep=keep)

    def num_samples(self, kept: Sequence[Labelled]) -> int:
        return len(self.labelled) + len(kept) + len(self.validation)

    def check_unscored(self, trained: DataConfig, found: Checkpoint) -> None:
        """Raise InputError where an image that would be labelled is in the validation split of the
        run. trained: the run's own data, where other data are labelled.
        """
        split, own = trained.val_split, trained.val_shards or trained.shards[0]
        # by content: they may lie in another place than when it was trained
        is_own = self.reader.manifest.sha256 == found.identity["manifest_sha256"]
        if is_own and not trained.val_shards:
            own = str(self.reader.location)
        try:
            scored = {*open_reader(trained, split, own).keys}
        except InputError as error:
            # a run may be taken to another machine without its data
            say(f"not compared with what the run was scored on: {error.got}")
            return
        shared = [key for key in self.unlabelled.keys if key in scored]
        if shared:
            got = f"{counted(len(shared), 'unlabelled image', verb=IS)} in {split} of {own}, "
            needed = "images that the run was not scored on: such scores would say nothing"
            got += f"the first: {shared[0]}"
            raise InputError(got, needed, "name other shards, or leave these images out")

    def samples(self, kept: Sequence[Labelled], origin: dict[str, Any]) -> Iterator[Sample]:
        """All of the new data set, each image in its original bytes; origin: of the labels of those
        that are kept.
        """
        train, val = self._splits
        source = f"pseudo-label of {origin['run']} at step {origin['step']}"
        yield from _as_they_are(self.labelled, train)
        for image in kept:
            raw = self.reader.read(self._without[image.index], with_label=False)
            label = decode_label(image.label)
            yield Sample(raw.key, raw.image, label, train, f"{source}: {raw.key}", origin=origin)
        yield from _as_they_are(self.validation, val)

    def truth(self, index: int) -> np.ndarray | None:
        """The label (H, W) that the shards have of an unlabelled image; None: none."""
        where = self._without[index]
        if self.reader.read(where).label is None:
            return None
        return SampleSet(self.reader, [where], keep=self._keep).load(0)[2]


def _as_they_are(samples: SampleSet, split: str) -> Iterator[Sample]:
    reader: ShardReader = samples.reader
    for index in range(len(samples)):
        key, _, label = samples.load(index)
        image = samples.original(index)
        yield Sample(key, image, label, split, f"{reader.manifest.name}/{key}")


class Labeller:
    """Labels unlabelled images with a run's segmentor, and says how sure it is."""

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        found: Checkpoint,
        choice: Choice,
        where: torch.device,
    ):
        self._choice, self._config = choice, config
        self._judge = None
        if choice.rank == "discriminator":
            self._judge = trained_discriminator(config, found, "--rank confidence").to(where)
        self._network, self.look = as_trained(network, config, found, Ranks(0, 1, 0, where))

    def __call__(self, data: Data, index: int) -> Labelled:
        """Of one of the unlabelled samples."""
        key, image, _ = data.unlabelled.load(index)
        chances, classes = self.look(self._network, image).max(0)  # (H, W) each
        label = classes.to(torch.uint8)
        label[chances < self._choice.threshold] = IGNORE_INDEX
        found = label.cpu().numpy()
        valid = found != IGNORE_INDEX
        labelled = Labelled(
            index, key, encode_label(found), float(chances.mean()), float(valid.mean())
        )
        if self._judge is not None:
            real = confidence_map(self._network, self._judge, self._config, image)
            labelled.realness = float(real.mean())
        truth = data.truth(index) if self._choice.compare else None
        if truth is not None:
            labelled.counts = self._counts(truth, found)
            counted_pixels = valid & (truth != IGNORE_INDEX)
            if counted_pixels.any():
                labelled.agreement = float((found == truth)[counted_pixels].mean())
        return labelled

    def _counts(self, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Of Labelled.counts; truth and found: (H, W) uint8."""
        parts = truth, truth[found != IGNORE_INDEX], truth[found == truth]
        # of 256 values, void's with them, so that no label is out of range
        return np.stack([np.bincount(part.ravel(), minlength=256) for part in parts])


def _check_out(out: Path, choice: Choice) -> None:
    """Raise InputError for a place that is taken or no file of ours, before time is spent."""
    if out.suffix not in (".h5", ".hdf5"):
        raise InputError(f"--out {out}", "a file that ends in .h5", f"write --out {out}.h5")
    beside = [out.with_suffix(".csv")] + [out.with_suffix(".png")] * choice.compare
    for path in (out, *beside):
        # labels that people have mended since must not be lost
        if path.exists():
            raise InputError(f"{path} exists", "a new file", "choose another --out, or remove it")
    check_writable(nearest_existing(out.parent), "choose another --out")


def _check_labelled(images: Sequence[Labelled], kept: Sequence[Labelled], choice: Choice) -> None:
    """Raise InputError where no image is kept."""
    if not kept:
        got = f"no pixel of {counted(len(images), 'unlabelled image')} has a class with a "
        got += f"probability from {choice.threshold:g} on"
        mean = max(image.confidence for image in images)
        needed = f"some; of the surest image the pixels' mean is {mean:.3f}"
        raise InputError(got, needed, "choose a lower --threshold, or a run that has learnt more")


def _write_table(path: Path, images: Sequence[Labelled], kept: Sequence[Labelled]) -> None:
    """A line for each image, in their order; no value where there is none."""
    chosen = {image.index for image in kept}
    with published(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["key", "kept", "confidence", "realness", "labelled_share", "agreement"])
        for image in images:
            numbers = (image.confidence, image.realness, image.labelled, image.agreement)
            cells = ["" if math.isnan(value) else f"{value:.6f}" for value in numbers]
            table.writerow([image.key, int(image.index in chosen), *cells])


def _draw_quality(kept: Sequence[Labelled], names: Sequence[str], out: Path) -> bool:
    """Draw of each class how much is labelled and how much of that is right, in the images that are
    kept and whose labels were compared; whether there are any.
    """
    # of the kept ones: the others teach nothing, however wrong they are
    known = [image.counts for image in kept if image.counts is not None]
    if not known:
        return False
    from distseg.tracking import bars  # other uses need not load matplotlib

    # 0 / 0 of a class that is absent, or of which nothing is labelled, is NaN
    with np.errstate(invalid="ignore"):
        present, labelled, right = np.sum(known, 0).astype(float)[:, : len(names)]
        shares = zip(labelled / present, right / labelled, strict=True)
    bars.kept_bars(dict(zip(names, shares, strict=True)), out)
    return True


def _told(images: Sequence[Labelled], kept: Sequence[Labelled], choice: Choice) -> str:
    """What became of the images, in a sentence."""
    share = float(np.mean([image.labelled for image in kept]))
    text = f"{len(kept)} of {counted(len(images), 'unlabelled image')} kept, "
    text += f"{share:.1%} of their pixels labelled (probability from {choice.threshold:g} on)"
    known = [image.agreement for image in kept if not math.isnan(image.agreement)]
    if known:
        text += f", {np.mean(known):.1%} of these as the shards have them (mean over images)"
    return text
