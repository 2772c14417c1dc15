"""`evaluate`, `checkpoint`, `tracking` and `parallel`: what changes nothing of what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distseg.config.keys import key


@dataclass
class EvaluateConfig:
    """Full-resolution evaluation on the validation split."""

    every_steps: int = key(
        0, "steps between two evaluations; 0: only after the last step", unit="steps", low=0
    )
    # "view", here and below: scores of other views are of the same network, yet never averaged
    scales: list[float] = key(
        [1.0],
        "test-time augmentation: probabilities are averaged over the image at these scales",
        low=0.1,
        high=8,
        grouping="view",
    )
    horizontal_flip: bool = key(
        False, "test-time augmentation: and over the flipped image", grouping="view"
    )
    # for images whose activations would not fit into memory at once
    window_px: int = key(
        0,
        "an image with a longer side is scored by a sliding window of this side, a multiple of 32; "
        "0: in one piece",
        unit="px",
        low=0,
        high=10**5,
        grouping="view",
    )
    # at a window's edge the network sees less around a pixel, so neighbours share some
    overlap_px: int = key(
        128,
        "of neighbouring windows: a multiple of 32, at most half the window",
        unit="px",
        low=32,
        high=10**5,
        grouping="view",
    )
    subsets: dict[str, Any] = key(
        {},
        "mean IoU over some of the classes too, as val/mean_iou_of/NAME: {NAME: [classes]}",
    )
    # with unlabelled data sets of their own it is scored in any case: there it is the source
    first_set: bool = key(
        False,
        "score the validation split of the first of data.shards too, under source/, where "
        "data.val_shards is another data set",
    )
    num_pictures: int = key(
        6, "validation images shown in pictures/ after the run", unit="images", low=0, high=64
    )
    palette: str = key(
        "data",
        "colours of the classes in pictures",
        choices={
            "data": "the data set's own",
            "safe": "told apart by colour-blind readers too, for any number of classes",
        },
        source="safe: Okabe and Ito 2008, continued by the largest CIEDE2000",
    )


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = key(200, "steps between two checkpoints", unit="steps", low=1)
    # two by default: where the last is damaged there is one before it
    keep_last: int = key(2, "checkpoints besides the best by validation mIoU", low=1)
    # on: the loop waits for the copy to host memory, and not for the disk
    async_save: bool = key(
        True, "copied to host memory at once, written to the disk while training goes on"
    )
    # the run directory itself stays on a file system: every rank writes there
    copy_to: str = key(
        "",
        "a URL (s3://, gs://, file:// or another of fsspec's) that checkpoints are copied to "
        "beside training, and fetched from where run_dir has none as new",
    )
    # of a job that is told to stop: below DISTSEG_STOP_SECONDS, after which its ranks are killed
    copy_wait_seconds: float = key(
        120.0,
        "how long the end of training waits for the last copy",
        unit="s",
        low=0,
        high=10**6,
    )


@dataclass
class TrackingConfig:
    """Where the curves go; metrics.jsonl in the run directory is always written."""

    # nobody is asked for a login, as there is nobody to answer in a batch job
    wandb: str = key(
        "auto",
        "Weights & Biases",
        choices={
            "auto": "online with a login, else offline",
            "online": "",
            "offline": "",
            "disabled": "",
        },
    )
    # free on resuming, like all of this section: where curves go changes no number
    # null, so that what is said here is known from what is not: that counts more than the
    # environment, docs/wandb.md
    project: str | None = key(None, "of Weights & Biases; null: WANDB_PROJECT, else distseg")
    entity: str | None = key(None, "of Weights & Biases; null: WANDB_ENTITY, else the login's own")
    group: str | None = key(None, "of Weights & Biases; null: WANDB_RUN_GROUP, else none")
    job_type: str | None = key(None, "of Weights & Biases; null: WANDB_JOB_TYPE, else none")
    tags: list[str] = key([], "of Weights & Biases; []: WANDB_TAGS, else none")
    tensorboard: bool = key(False, "event files in the run directory's tensorboard/ too")
    # reading a metric waits for the device, so not at every step
    log_every: int = key(10, "steps between two lines of metrics", unit="steps", low=1)


@dataclass
class ProfileConfig:
    """What some steps are made of, written into the run directory's profile/."""

    # a few, once caches are warm: a trace of a step has some megabytes
    steps: str = key("", 'FIRST:LAST, both included, as "10:13": traced; "": none')
    ranks: list[int] = key([0], "that write a trace", low=0)
    # off: each allocation then takes some microseconds longer
    memory: bool = key(
        False,
        "on a GPU: remember where memory is asked for, so that the snapshot of a rank that runs "
        "out of it names the lines",
    )


@dataclass
class ParallelConfig:
    """How the networks are spread over the ranks."""

    # all give the same numbers to rounding, so this is about memory and speed alone
    strategy: str = key(
        "ddp",
        "what a rank holds",
        choices={
            "ddp": "all of both networks",
            "fsdp": "a shard of parameters, gradients and optimizer state",
            "deepspeed": "as zero_stage says",
        },
    )
    # the ranks of one machine, for example: then parameters never travel between machines
    shard_size: int = key(
        0,
        "fsdp: ranks that share one copy, the next ones hold another; 0: all ranks share one",
        unit="ranks",
        low=0,
        high=10**6,
    )
    # blocks alone: batch normalisation takes no parameters that are coarser than its statistics
    gather_dtype: str = key(
        "fp32",
        "fsdp, precision=bf16: as what a block's parameters are gathered and computed with",
        choices={
            "fp32": "as they are kept; autocast then rounds a copy of them for each product",
            "bf16": "rounded before they are sent; kept, summed over the ranks and updated in "
            "fp32; blocks with batch normalisation and what is in no block stay in fp32",
        },
    )
    zero_stage: int = key(
        1,
        "deepspeed: ranks hold shards of the optimizer state (1), gradients too (2), parameters "
        "too (3)",
        low=0,
        high=3,
        source="ZeRO, Rajbhandari et al. 2020",
    )
    # of its keys only some: the alternating step is proven with no others
    deepspeed_config: str = key(
        "", "deepspeed: a JSON file of its own settings, on top of what is generated"
    )
    # longer than anything that a rank does between two reports, or sound ranks are ended
    timeout_seconds: float = key(
        300.0,
        "a rank that gives no sign for so long ends the job, and is named",
        unit="s",
        low=1,
        high=10**6,
    )
    # seldom, as a comparison waits for the device; replicas that drift apart give no error
    check_every: int = key(
        500,
        "steps between two comparisons of the networks over the ranks; 0: never",
        unit="steps",
        low=0,
    )
