"""What a run leaves to look at: its curves, IoU of each class, and validation images.

Training draws them at its end; `distseg pictures` draws them again, in other colours, of other
images, or as drawings for a paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distseg.config import loading
from distseg.config.schema import ADAPTATION, Config
from distseg.data.samples import SampleSet
from distseg.distributed.ranks import joined
from distseg.evaluate import document
from distseg.evaluate.run import check_overrides, evaluator_of, open_samples
from distseg.evaluate.trained import trained_segmentor
from distseg.tracking import bars, figures
from distseg.tracking.catalogue import CLASS_IOU, SOURCE_SHARE, TARGET_SHARE
from distseg.tracking.palettes import coloured
from distseg.tracking.tracker import METRICS_FILE, read_metrics
from shards.errors import InputError
from shards.files import tracked
from shards.sample import ClassSet
from shards.words import counted

# within it, of unlabelled images; training alone draws these, from its own views
FOLDER, TAUGHT_FOLDER, BESIDE_FOLDER = "pictures", "pseudo_labels", "beside"


def run(
    run_dir: Path,
    which: str,
    out: Path | None,
    form: str,
    overrides: Sequence[str] = (),
    *,
    beside: Path | None = None,
) -> int:
    """`distseg pictures RUN`: curves.*, iou.*, samples/KEY.* and, of two domains, shares.*, as png,
    svg or pdf; with another run `beside` it, beside/KEY.*.

    which: the checkpoint that looks at the images. out: None for RUN/pictures. overrides: key=value
    that may differ from the run when it is evaluated, evaluate.palette among them. Raises
    InputError for a folder that is no run, and for shards that are not there unless
    evaluate.num_pictures is 0, which needs neither them nor a network.
    """
    check_overrides(list(overrides))
    overrides = loading.of_validation(list(overrides))
    out = out or run_dir / FOLDER
    config = loading.override(loading.from_file(run_dir / "config.yaml"), overrides)
    drawn = draw_scores(run_dir, out, config, form)
    if config.evaluate.num_pictures:
        drawn += _draw_samples(run_dir, which, out, form, overrides)
        if beside is not None:
            drawn += _draw_beside((beside, run_dir), which, out, form, overrides)
    print(f"wrote {counted(drawn, 'picture')} into {out}")
    return 0


def draw_scores(run_dir: Path, out: Path, config: Config, form: str = "png") -> int:
    """Draw curves.* and, of a run that was evaluated, iou.* and shares.* into `out`; how many."""
    # from the file and not from memory: it has the steps of earlier attempts too
    metrics, of_domains = read_metrics(run_dir / METRICS_FILE), config.mode in ADAPTATION
    figures.curves(metrics, out / f"curves.{form}", config.loss.adv_form, of_domains)
    scores = _scores(run_dir / "evaluation.json")
    class_iou = _by_class(scores, CLASS_IOU)
    if class_iou:
        bars.iou_bars(class_iou, out / f"iou.{form}")
    target, source = (_by_class(scores, prefix) for prefix in (TARGET_SHARE, SOURCE_SHARE))
    has_both = bool(target) and target.keys() == source.keys()
    if has_both:
        shares = {name: (target[name], source[name]) for name in target}
        bars.share_bars(shares, out / f"shares.{form}")
    return 1 + bool(class_iou) + has_both


def _scores(path: Path) -> dict[str, Any]:
    """What an evaluation found; {} where there is none yet."""
    if not path.is_file():
        return {}
    try:
        return document.read(path)
    except ValueError as error:
        got = f"{path}, which cannot be read ({error})"
        raise InputError(got, "JSON as training writes it", "remove it") from None


def _by_class(scores: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The scores of a family by class, NaN for an absent one."""
    found = {}
    for name, value in scores.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = math.nan if value is None else float(value)
    return found


def _draw_samples(run_dir: Path, which: str, out: Path, form: str, overrides: Sequence[str]) -> int:
    network, config, found = trained_segmentor(run_dir, which)
    config = loading.override(config, list(overrides))
    samples = open_samples(config, found)
    classes = classes_in(config, samples)
    with joined(config.device, config.parallel.timeout_seconds) as ranks:
        evaluator = evaluator_of(network, config, found, samples, ranks)
        indices = list(spread(config.evaluate.num_pictures, len(samples)))
        for index in tracked(indices, len(indices), "drawing"):
            key, image, label = samples.load(index)
            # evaluator_of has moved the network to the device
            probabilities = evaluator.probabilities(network, image).cpu().numpy()
            path = out / "samples" / f"{key}.{form}"
            figures.sample_panel(image, label, probabilities, classes, path)
    return len(indices)


def _draw_beside(
    run_dirs: tuple[Path, Path], which: str, out: Path, form: str, overrides: Sequence[str]
) -> int:
    """Draw images of the second run's validation split with what both runs make of them."""
    if run_dirs[0].resolve() == run_dirs[1].resolve():
        raise InputError(f"--beside {run_dirs[0]}, the run itself", "another run", "name another")
    networks = [trained_segmentor(run_dir, which) for run_dir in run_dirs]
    first, second = (found.identity["classes"] for _, _, found in networks)
    if first != second:
        got = f"{run_dirs[0]} and {run_dirs[1]}, whose classes differ"
        raise InputError(got, "runs of the same classes", "choose another run")
    # the same images, scales and windows for both, but each network as it was trained
    configs = [loading.override(config, list(overrides)) for _, config, _ in networks]
    samples = open_samples(configs[1], networks[1][2])
    classes = classes_in(configs[1], samples)
    names = [run_dir.resolve().name for run_dir in run_dirs]
    # both stand in a title, where a whole path has no room unless it must
    if names[0] == names[1]:
        names = [str(run_dir) for run_dir in run_dirs]
    with joined(configs[1].device, configs[1].parallel.timeout_seconds) as ranks:
        looking = []
        for (network, _, found), config in zip(networks, configs, strict=True):
            looking.append((evaluator_of(network, config, found, samples, ranks), network))
        indices = list(spread(configs[1].evaluate.num_pictures, len(samples)))
        for index in tracked(indices, len(indices), "drawing both"):
            key, image, label = samples.load(index)
            predictions = {}
            for name, (evaluator, network) in zip(names, looking, strict=True):
                chances = evaluator.probabilities(network, image)
                predictions[name] = chances.argmax(0).to(torch.uint8).cpu().numpy()
            path = out / BESIDE_FOLDER / f"{key}.{form}"
            figures.beside_panel(image, label, predictions, classes, path)
    return len(indices)


def classes_in(config: Config, samples: SampleSet) -> ClassSet:
    """The classes of a split in the colours of `evaluate.palette`."""
    return coloured(samples.classes, config.evaluate.palette)


def spread(count: int, total: int) -> Iterator[int]:
    """Indices of at most `count` samples of `total`, evenly over all of them.

    The same in every run of a split, so that reports lay them side by side.
    """
    count = min(count, total)
    return (place * total // count for place in range(count))
