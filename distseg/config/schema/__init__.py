"""The configuration as typed sections: every key with its default, meaning, unit and rules.

What `key()` takes is in keys.py. Rules between several keys are in config/rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from distseg.config.keys import key, section
from distseg.config.schema.common import (
    ADAPTATION,
    DISCRIMINATORS,
    ENCODERS,
    HEADS,
    MAX_BETA,
    MAX_SEED,
    SEGMENTORS,
    SEGMENTORS_TOLD,
    SEMI_SUPERVISED,
    WITH_DISCRIMINATOR,
    WITH_GROUND_TRUTH,
    WITH_UNLABELLED,
)
from distseg.config.schema.data import DataConfig
from distseg.config.schema.losses import (
    AdaptationConfig,
    ConsistencyConfig,
    LossConfig,
    SemiConfig,
    TermConfig,
)
from distseg.config.schema.networks import DiscriminatorConfig, SegmentorConfig
from distseg.config.schema.optimization import AlternationConfig, OptimizerConfig, ScheduleConfig
from distseg.config.schema.running import (
    CheckpointConfig,
    EvaluateConfig,
    ParallelConfig,
    ProfileConfig,
    TrackingConfig,
)
from distseg.config.schema.strong import StrongConfig

__all__ = [
    "ADAPTATION",
    "DISCRIMINATORS",
    "ENCODERS",
    "HEADS",
    "MAX_BETA",
    "MAX_SEED",
    "SEGMENTORS",
    "SEGMENTORS_TOLD",
    "SEMI_SUPERVISED",
    "WITH_DISCRIMINATOR",
    "WITH_GROUND_TRUTH",
    "WITH_UNLABELLED",
    "AdaptationConfig",
    "AlternationConfig",
    "CheckpointConfig",
    "Config",
    "ConsistencyConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "EvaluateConfig",
    "LossConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "SegmentorConfig",
    "SemiConfig",
    "StrongConfig",
    "TermConfig",
    "TrackingConfig",
]


@dataclass
class Config:
    """Everything a run depends on. Saved in the run directory before the first step."""

    preset: str | None = key(None, "the named recipe that the other keys stand on top of")
    run_dir: str = key("", 'where all of the run is written; "": runs/<preset>', on_resume=True)
    # one program for all three: they differ in which terms a step has
    mode: str = key(
        "adversarial",
        "what the segmentor learns from",
        choices={
            "adversarial": "labels and a discriminator",
            "supervised": "labels alone",
            "semi_supervised": "both, and unlabelled images",
            "consistency": "labels and unlabelled images, without a discriminator",
            "domain_adaptation": "labels of one domain, and images of another whose predictions "
            "are to look like the first one's to a discriminator",
        },
    )
    # of the whole run and not more steps from now: so the same command resumes it
    steps: int = key(1000, "updates in all (each of batch_size images)", low=1, high=10**8 - 1)
    # asked for, as the schedule goes by `steps`: another number is another course of the rate
    extend: bool = key(
        False,
        "lets steps be more than when the run was started, so that it is trained on from its last "
        "checkpoint and its history stays; the learning rate at a step is from then on what a run "
        "of the new length has there (poly: it goes up once; constant: nothing changes)",
        on_resume=True,
    )
    # GLOBAL as well: with as many images a step on any number of ranks, rates need no new choice
    batch_size: int = key(
        16, "GLOBAL: images per step over all ranks", unit="images", low=1, high=10**6
    )
    # "none": what differs in the seed alone is what means and deviations are taken over
    seed: int = key(
        0, "of first weights and the order of samples", low=0, high=MAX_SEED, grouping="none"
    )
    # may change: checkpoints hold plain tensors, of no device
    device: str = key(
        "auto",
        "what computes",
        choices={"auto": "cuda where there is one", "cpu": "", "cuda": ""},
        on_resume=True,
        at_evaluation=True,
    )
    # not on resuming: "auto" is kept as what it first became
    precision: str = key(
        "auto",
        "of forward and backward passes",
        choices={
            "auto": "bf16 where the device computes in it, else fp32",
            "bf16": "autocast, parameters stay fp32",
            "fp16": "autocast with loss scaling, parameters stay fp32",
            "fp32": "",
            "fp64": "parameters too",
        },
        at_evaluation=True,
        at_prediction=True,
    )
    tf32: bool = key(
        True, "fp32 products on a GPU in TF32: a mantissa of 10 bits, several times as fast"
    )
    compile: bool = key(False, "torch.compile for both networks: slow to start, worth it on a GPU")
    gradient_accumulation_steps: int = key(
        1,
        "micro-batches: a step's images are taken in so many, one after the other, to save memory",
        low=1,
        high=10**4,
    )
    # the layout that convolutions are fastest in, on CPUs and GPUs
    channels_last: bool = key(True, "memory format of images and weights")
    ema_decay: float = key(
        0.0,
        "exponential moving average (EMA) of the segmentor's weights, used for evaluation; 0: off",
        low=0,
        high=MAX_BETA,
    )
    # some in a row are usual while fp16's loss scale is found; so many mean that training is over
    max_skips: int = key(
        20, "stop after so many non-finite gradients in a row", unit="steps", low=1, on_resume=True
    )
    # may change, as training fills it in anew; `code.check_unchanged` compares it
    code: dict[str, str] = key(
        {},
        "sha256 of each file of your own code, by the part that names it; filled in by training",
        on_resume=True,
    )
    allow_changed_code: bool = key(
        False, "go on with a run though a file of your own code has changed", on_resume=True
    )
    # What is said of a section holds for all of its keys. Those down to `semi` shape the networks,
    # so there each key says for itself what may change; the last five do not.
    data: DataConfig = section(DataConfig)
    segmentor: SegmentorConfig = section(SegmentorConfig)
    discriminator: DiscriminatorConfig = section(DiscriminatorConfig, modes=WITH_DISCRIMINATOR)
    segmentor_optimizer: OptimizerConfig = section(OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = section(OptimizerConfig, modes=WITH_DISCRIMINATOR)
    schedule: ScheduleConfig = section(ScheduleConfig)
    alternation: AlternationConfig = section(AlternationConfig, modes=WITH_DISCRIMINATOR)
    loss: LossConfig = section(LossConfig)
    semi: SemiConfig = section(SemiConfig, modes=WITH_UNLABELLED)
    consistency: ConsistencyConfig = section(ConsistencyConfig, modes=WITH_UNLABELLED)
    adaptation: AdaptationConfig = section(AdaptationConfig, modes=ADAPTATION)
    strong: StrongConfig = section(StrongConfig)
    evaluate: EvaluateConfig = section(
        EvaluateConfig, on_resume=True, at_evaluation=True, at_prediction=True
    )
    checkpoint: CheckpointConfig = section(CheckpointConfig, on_resume=True)
    tracking: TrackingConfig = section(TrackingConfig, on_resume=True)
    parallel: ParallelConfig = section(ParallelConfig, on_resume=True, at_evaluation=True)
    profile: ProfileConfig = section(ProfileConfig, on_resume=True)
