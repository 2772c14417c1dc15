"""What a finished run leaves to look at: scores as JSON, curves, pictures of validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from distseg.data.samples import SampleSet
from distseg.evaluate.pictures import FOLDER, TAUGHT_FOLDER, classes_in, draw_scores, spread
from distseg.tracking import figures
from distseg.train.batch import Images
from distseg.train.trainer import Trainer
from shards.files import write_json
from shards.sample import ClassSet


def show(
    trainer: Trainer,
    network: nn.Module,
    val_set: SampleSet,
    views: tuple[Images, Images] | None = None,
) -> None:
    """Write evaluation.json and pictures/ into the run directory, and the pictures into W&B; on the
    main rank.

    network: the one that was scored, with all its parameters. views: of Trainer.next_views.
    """
    run_dir, step = Path(trainer.config.run_dir), trainer.state.step
    evaluator = trainer.evaluator
    assert evaluator.result is not None
    network.eval()  # training is over
    trainer.check_folder()
    trainer.watchdog.report("scores and curves")
    # first: the scores are what the run was for, and drawing is what can fail
    report = evaluator.report(step)
    # beside the target's, which come first: they are what the run is for
    if trainer.source is not None:
        report |= trainer.source.written()
    write_json(run_dir / "evaluation.json", report)
    folder = run_dir / FOLDER
    draw_scores(run_dir, folder, trainer.config)
    trainer.tracker.image(step, "curves", folder / "curves.png")
    classes = classes_in(trainer.config, val_set)
    _show_samples(trainer, network, val_set, classes)
    if views is not None:
        _show_views(trainer, folder, views, classes)
    curves = folder / "curves.png"
    trainer.progress.message(f"look at {curves}, then at iou.png and samples/ beside it")


def _show_samples(
    trainer: Trainer, network: nn.Module, val_set: SampleSet, classes: ClassSet
) -> None:
    """Draw validation images with what the network makes of them."""
    folder, step = Path(trainer.config.run_dir) / FOLDER, trainer.state.step
    evaluator = trainer.evaluator
    for index in spread(trainer.config.evaluate.num_pictures, len(val_set)):
        # each picture, since all of them may take longer than the time limit
        trainer.watchdog.report("pictures")
        trainer.check_folder()
        key, image, label = val_set.load(index)
        probabilities = evaluator.augmentation(network, image).cpu().numpy()
        out = folder / "samples" / f"{key}.png"
        figures.sample_panel(image, label, probabilities, classes, out)
        trainer.tracker.image(step, f"samples/{key}", out)
        masks = {"label": label, "prediction": probabilities.argmax(0).astype(np.uint8)}
        # besides the panel: in W&B masks can be switched on and off over the picture
        trainer.tracker.masks(step, f"masks/{key}", image, masks, val_set.classes.names)


def _show_views(
    trainer: Trainer, folder: Path, views: tuple[Images, Images], classes: ClassSet
) -> None:
    """Draw what the teacher makes of the first unlabelled images, and what is trained on."""
    threshold = trainer.config.consistency.threshold
    # all strong views of an image stand together; its first one is shown
    num_views = len(views[1].label) // len(views[0].label)
    count = min(trainer.config.evaluate.num_pictures, len(views[0].label))
    for index in range(count):
        trainer.watchdog.report("pictures")
        trainer.check_folder()
        weak = _taught(views[0], index, threshold)
        strong = _taught(views[1], index * num_views, threshold)
        out = folder / TAUGHT_FOLDER / f"unlabelled_{index + 1}.png"
        figures.taught_panel(weak, strong, classes, threshold, out)
        trainer.tracker.image(trainer.state.step, f"{TAUGHT_FOLDER}/unlabelled_{index + 1}", out)


def _taught(images: Images, index: int, threshold: float) -> figures.Taught:
    """One of the images, on the CPU."""
    assert images.pseudo is not None
    # float64 and bf16 runs too: a picture has bytes
    pixels = images.pixels[index].permute(1, 2, 0).float().mul(255).round()
    return figures.Taught(
        pixels.byte().cpu().numpy(),
        images.pseudo.label[index].cpu().numpy(),
        (images.pseudo.confidence[index] >= threshold).cpu().numpy(),
    )
