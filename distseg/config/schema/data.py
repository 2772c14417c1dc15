"""`data`: which samples, and the view of them that is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distseg.config.keys import key
from distseg.config.schema.common import MAX_SEED, WITH_UNLABELLED


@dataclass
class DataConfig:
    """Which samples, and how a training crop is cut from them."""

    # may change: a run is held to the manifest's sha256, so the same shards may lie elsewhere
    shards: list[str] = key(
        [],
        "directory written by `distseg pack` (manifest.json and *.tar), or its http, s3 or gs URL; "
        "of several, [DIR,DIR], the samples are mixed, and the classes are those of the first",
        on_resume=True,
        at_evaluation=True,
    )
    weights: list[float] = key(
        [],
        "shares of data.shards in every batch: [3,1] are three quarters and one; []: as many "
        "samples as each has",
        low=0,
    )
    class_map: dict[str, Any] = key(
        {},
        "classes of further data sets that are spelt otherwise, by the set's name: {NAME: {class "
        'of the run: class of the set, or several, or "void" where it has none; void: [classes '
        "of the set that are none of the run's]}}",
    )
    unlabelled_shards: list[str] = key(
        [],
        "as data.shards, of images whose labels, if any, are not read; []: the images of "
        "data.shards whose labels are not used",
        on_resume=True,
        modes=WITH_UNLABELLED,
    )
    unlabelled_weights: list[float] = key(
        [], "as data.weights, of data.unlabelled_shards", low=0, modes=WITH_UNLABELLED
    )
    unlabelled_split: str = key(
        "", 'split of data.unlabelled_shards; "": data.train_split', modes=WITH_UNLABELLED
    )
    val_shards: str = key(
        "",
        'what is evaluated on; "": the first of data.shards',
        on_resume=True,
        at_evaluation=True,
    )
    # off, since a wrong label costs no error, only accuracy
    allow_unverified: bool = key(
        False,
        "train on shards that neither `distseg pack` nor `distseg inspect` vouches for",
        on_resume=True,
    )
    # never needed again after the run, so the job's own disk goes first
    cache_dir: str = key(
        "",
        'for shards behind a URL; "": $SLURM_TMPDIR, $TMPDIR or the user\'s cache directory',
        on_resume=True,
        at_evaluation=True,
    )
    # a float, so that 200e9 can be written
    cache_bytes: float = key(
        0,
        "bound of that folder, 200e9 for example; 0: 80 % of what is free on its disk",
        unit="bytes",
        low=0,
        on_resume=True,
        at_evaluation=True,
    )
    # fixed for a run, as it decides the order of samples; that of the evaluation is not
    train_split: str = key("train", "split of the shards that is trained on")
    val_split: str = key(
        "val", "split of the shards that is evaluated on, after training too", at_evaluation=True
    )
    labelled: str = key(
        "all", "whose labels are used: all; a share, 1/8 or 0.125; a file with one key a line"
    )
    # apart from `seed`: runs over several seeds must share their labels to be averaged
    labelled_seed: int = key(
        0, "draws the share; the list is saved in the run directory", low=0, high=MAX_SEED
    )
    keep_classes: list[str] = key(
        [], 'names of classes that stay; all others become "other" (index 0); []: all stay'
    )
    # 255 classes at most: a label is a byte, and 255 is void
    num_classes: int | None = key(
        None, "null: as many as there are; a number must agree with that", low=1, high=255
    )
    # below 32 px an encoder of stride 32 has no whole cell
    crop_px: int = key(240, "side of the square training crop", unit="px", low=32, high=4096)
    # bounds keep slips of the decimal point out: beyond them no picture is left to see
    scale_min: float = key(
        0.5,
        "smallest factor of random scaling; log-uniform from here to data.scale_max",
        low=0.05,
        high=20,
    )
    scale_max: float = key(1.5, "largest factor of random scaling", low=0.05, high=20)
    horizontal_flip: bool = key(True, "swap left and right with probability 1/2")
    # off by default, as the next two: what helps depends on the data
    rotate_degrees: float = key(
        0.0, "turned by an angle uniform in -+ this; 0: off", unit="degrees", low=0, high=180
    )
    color_jitter: float = key(
        0.0, "strength of brightness, contrast and saturation changes", low=0, high=1
    )
    blur_probability: float = key(
        0.0,
        "of a Gaussian blur; 0.5 in the source",
        low=0,
        high=1,
        source="SimCLR, Chen et al. 2020, appendix A",
    )
    blur_max_px: float = key(
        2.0,
        "the blur's standard deviation is uniform from 0.1 to this",
        unit="px of the crop",
        low=0.1,
        high=100,
        source="SimCLR, Chen et al. 2020, appendix A",
    )
    view: str = key(
        "",
        "code of your own, as path/to/file.py:name or package.module:name, that gets each training "
        "crop last; see examples/own_view.py",
    )
    view_options: dict[str, Any] = key({}, "further keyword arguments of data.view")
    # the default is what published recipes do; the others are for classes of few pixels
    sampling: str = key(
        "each_once",
        "which sample comes next",
        choices={
            "each_once": "every sample once per epoch",
            "class_balanced": "a random class, then one of the samples that show it",
            "rare_class": "likewise; the fewer pixels a class has, the likelier it is",
        },
        source="rare_class: DAFormer, Hoyer et al. 2022, section 3.2",
    )
    # it divides, so not 0
    rare_class_temperature: float = key(
        0.01,
        "the lower, the more of the rarest classes; 0.01 in the source on Cityscapes",
        low=1e-4,
        source="DAFormer, Hoyer et al. 2022, section 3.2",
    )
    # in shards, which are what is fetched from far away
    shuffle_block: int = key(
        0,
        "shards whose samples are shuffled together, the shards in random order; 0: all of them",
        unit="shards",
        low=0,
        high=10**6,
    )
    # may change: a sample's pixels follow from its position, whoever makes them
    num_threads: int = key(
        2,
        "decoding workers of a rank; 0: in the training thread",
        low=0,
        high=256,
        on_resume=True,
        at_evaluation=True,
    )
    # threads first: codecs and warp release the interpreter's lock, and nothing is copied
    worker_type: str = key(
        "thread",
        "what decodes",
        choices={
            "thread": "threads of the training process",
            "process": "processes: where one interpreter's lock is too narrow for many workers",
        },
        on_resume=True,
    )
    # may change, as it decides what is decoded again and nothing else
    keep_decoded_bytes: float = key(
        0,
        "memory of a rank for training samples that stay decoded, 4e9 for example; threads only",
        unit="bytes",
        low=0,
        on_resume=True,
    )

    def __post_init__(self) -> None:
        # as on the command line: else the letters of a path would be taken for folders
        if isinstance(self.shards, str):
            self.shards = [self.shards]
