"""The configuration as typed parts.

Every key with its default, meaning and unit. Loading is configuration.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """Which samples, and how a training view is cut from them."""

    # directory written by `distseg pack` (manifest.json and *.tar), or its http, s3 or gs URL
    shards: str = ""
    # train on shards that neither `distseg pack` nor `distseg inspect` vouches for
    allow_unverified: bool = False
    # for shards behind a URL; "": $SLURM_TMPDIR, $TMPDIR or the user's cache directory
    cache_dir: str = ""
    # bound of that folder, 200e9 for example; 0: 80 % of what is free on its disk
    cache_bytes: float = 0
    train_split: str = "train"
    val_split: str = "val"
    # whose labels are used: all; a share, 1/8 or 0.125; a file with one key a line
    labelled: str = "all"
    labelled_seed: int = 0  # draws the share; the list is saved in the run directory
    # all others become "other" (index 0); []: all stay
    keep_classes: list[str] = field(default_factory=list)
    num_classes: int | None = None  # None: as many as there are; a number must agree with that
    crop_px: int = 240  # side of the square training view, pixels
    scale_min: float = 0.5  # the view's scale is log-uniform between these two
    scale_max: float = 1.5
    mirror: bool = True  # horizontal, with probability 1/2
    rotate_degrees: float = 0.0  # turned by an angle uniform in -+ this, 0 to 180; 0: off
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation changes, 0 to 1
    blur_probability: float = 0.0  # of a Gaussian blur; SimCLR (Chen et al. 2020, appendix A): 0.5
    # its standard deviation, in pixels of the view, is uniform from 0.1 to this (the same)
    blur_max_px: float = 2.0
    # code of your own, as path/to/file.py:name, that gets each view last; see data/own_view.py
    view: str = ""
    view_options: dict[str, Any] = field(default_factory=dict)  # its further keyword arguments
    # each_once: every sample once per epoch; class_balanced: a random class, then one of the
    # samples that show it; rare_class: likewise, and the fewer pixels a class has, the likelier it
    # is (Hoyer et al. 2022, section 3.2)
    sampling: str = "each_once"
    # the lower, the more of the rarest (the same: 0.01 on Cityscapes)
    rare_class_temperature: float = 0.01
    # shards whose samples are shuffled together, the shards in random order; 0: all of them
    shuffle_block: int = 0
    num_threads: int = 2  # decoding workers a rank; 0: in the training thread
    # thread; process: where one interpreter's lock is too narrow for many workers
    worker_type: str = "thread"
    # memory a rank, 4e9 for example: training samples that stay decoded; threads only
    keep_decoded_bytes: float = 0


@dataclass
class SegmentorConfig:
    """The network that predicts a class for every pixel.

    `segmentor=NAME` on the command line sets the name.
    """

    # one of `distseg models`, or your own: path/to/file.py:name or package.module:name
    name: str = "deeplabv3plus_efficientnet_lite0"
    init: str = "imagenet"  # imagenet, random, or a file of weights
    # statistics of the rank's images; synchronised: of all; frozen: the stored
    batch_norm: str = "per_rank"
    # further keyword arguments of the network
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DiscriminatorConfig:
    """The adversary; `discriminator=NAME` on the command line sets the name.

    Not built in supervised mode.
    """

    # one of `distseg models`, or your own: path/to/file.py:name or package.module:name
    name: str = "two_branch"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """One network's optimizer; biases and other one-dimensional parameters are not decayed."""

    name: str = "adamw"  # adamw or sgd
    lr: float = 1e-3
    encoder_lr_factor: float = 1.0  # the encoder's rate is lr times this (segmentor only)
    bias_lr_factor: float = 1.0  # biases' rate is the layer's times this (Long et al. 2015: 2)
    nesterov: bool = False  # sgd only
    weight_decay: float = 0.01
    beta1: float = 0.9  # adamw's first moment, sgd's momentum
    beta2: float = 0.999
    clip_norm: float = 5.0  # largest gradient norm; 0: not clipped


@dataclass
class ScheduleConfig:
    """The learning rate's course over the steps of the run, for both networks."""

    name: str = "poly"  # poly: (1 - step/steps)^power; constant; plateau: see below
    power: float = 0.9  # Chen et al. 2016 (DeepLab), section 4.1
    warmup_steps: int = 0  # linear from 1/warmup_steps, on top of the above
    plateau_factor: float = 0.5  # plateau: the rate is multiplied by this ...
    plateau_patience: int = 3  # ... after so many evaluations in a row without a lower val/loss
    # the run ends after so many such evaluations, under any schedule; 0: never
    early_stop_patience: int = 0


@dataclass
class AlternationConfig:
    """Who is updated at which step; the phase follows from the global step alone."""

    # simultaneous: both at every step (Hung et al. 2018); blocks (Luc et al. 2016)
    name: str = "simultaneous"
    segmentor: int = 500  # blocks: steps of one segmentor block, which comes first
    discriminator: int = 500  # blocks: steps of one discriminator block


@dataclass
class LossConfig:
    """Weights and reductions; a weight means nothing without the reductions, so both are named."""

    adv_weight: float = 0.05  # lambda on the adversarial term; 0: the discriminator only watches
    # + BCE(D(fake), real); saturating: - BCE(D(fake), fake), Luc et al. 2016 eq. 3
    adv_form: str = "non_saturating"
    # before it there is no adversary: plain supervised steps, the discriminator untouched
    adv_start_step: int = 0
    adv_warmup_steps: int = 0  # adv_weight rises linearly over so many steps from adv_start_step on
    # the discriminator's target for real label maps; 0.9: one-sided label smoothing
    real_target: float = 1.0
    # ground truth as the discriminator sees it; scaling: softened, Luc et al. 2016
    real_map: str = "one_hot"
    scaling_tau: float = 0.9  # scaling: at least this mass stays on the true class
    # label maps at the segmentor's output resolution (Luc et al.); image: at the view's
    map_resolution: str = "output"
    # mean over the valid pixels of the global batch; sum: their sum per image
    ce_reduction: str = "mean_valid"
    # mean over the discriminator's (valid) outputs of the global batch; sum: per image
    adv_reduction: str = "mean"


@dataclass
class SemiConfig:
    """The terms on unlabelled images, in mode=semi_supervised (Hung et al. 2018, eq. 4 and 5)."""

    batch_size: int = 0  # GLOBAL: unlabelled images a step; 0: as many as labelled ones
    weight: float = 0.1  # lambda_semi on the masked cross entropy
    threshold: float = 0.2  # T_semi: a pixel is believed where D(fake) is above it
    start_step: int = 5000  # of the masked cross entropy
    adv_weight: float = 0.001  # on the adversarial term
    adv_start_step: int = 0  # of that term, not before loss.adv_start_step
    discriminate: bool = True  # the discriminator learns from their label maps too


@dataclass
class EvaluateConfig:
    """Full-resolution evaluation on the validation split."""

    every_steps: int = 0  # 0: only after the last step
    scales: list[float] = field(default_factory=lambda: [1.0])  # probabilities averaged over these
    mirror: bool = False  # and over the mirrored image
    # an image with a longer side is scored in blended windows of this side; 0: in one piece
    window_px: int = 0
    # of two windows; both are multiples of 32, the overlap at most half the window
    overlap_px: int = 128
    num_pictures: int = 6  # validation images shown in pictures/ after the run


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 200
    keep_last: int = 2  # besides the best by validation mIoU
    # copied to host memory at once, written to the disk while training goes on
    async_save: bool = True


@dataclass
class TrackingConfig:
    """Where the curves go; metrics.jsonl in the run directory is always written."""

    wandb: str = "auto"  # auto: online with a login, else offline; online; offline; disabled
    project: str = "distseg"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    tensorboard: bool = False  # event files in the run directory's tensorboard/ too
    log_every: int = 10  # steps between two lines of metrics


@dataclass
class ParallelConfig:
    """How the networks are spread over the ranks."""

    # ddp: every rank holds all; fsdp: a slice of parameters, gradients, optimizer state; deepspeed:
    # see zero_stage
    strategy: str = "ddp"
    # fsdp: ranks that share one copy, the next ones hold another; 0: all ranks share one
    shard_size: int = 0
    # deepspeed: ranks hold parts of optimizer state (1), gradients too (2), parameters too (3)
    zero_stage: int = 1
    # deepspeed: a JSON file of its own settings, on top of what is generated
    deepspeed_config: str = ""
    # a rank that gives no sign for so long ends the job, and is named
    timeout_seconds: float = 300.0
    check_every: int = 500  # steps between two comparisons of the networks over the ranks; 0: never


@dataclass
class Config:
    """Everything a run depends on. Saved in the run directory before the first step."""

    preset: str | None = None
    run_dir: str = ""  # default: runs/<preset>
    mode: str = "adversarial"  # adversarial, supervised or semi_supervised
    steps: int = 1000  # updates in all (each of batch_size images)
    batch_size: int = 16  # GLOBAL: images per step over all ranks
    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one; cpu; cuda
    # auto: bf16 where the device computes in it, else fp32; bf16; fp16; fp32; fp64
    precision: str = "auto"
    # fp32 products on a GPU in TF32: a mantissa of 10 bits, several times as fast
    tf32: bool = True
    compile: bool = False  # torch.compile for both networks: slow to start, worth it on a GPU
    # a step's images are taken in so many parts, one after the other, to save memory
    accumulate_steps: int = 1
    channels_last: bool = True
    ema_decay: float = 0.0  # moving average of the segmentor, used for evaluation; 0: off
    max_skips: int = 20  # stop after so many non-finite gradients in a row
    # sha256 of each file of your own code by the part that names it; filled in by training
    code: dict[str, str] = field(default_factory=dict)
    allow_changed_code: bool = False  # go on with a run though such a file has changed
    data: DataConfig = field(default_factory=DataConfig)
    segmentor: SegmentorConfig = field(default_factory=SegmentorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    segmentor_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    alternation: AlternationConfig = field(default_factory=AlternationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    semi: SemiConfig = field(default_factory=SemiConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("adversarial", "supervised", "semi_supervised"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "bf16", "fp16", "fp32", "fp64"),
    "data.sampling": ("each_once", "class_balanced", "rare_class"),
    "data.worker_type": ("thread", "process"),
    "segmentor.batch_norm": ("per_rank", "frozen", "synchronised"),
    "segmentor_optimizer.name": ("adamw", "sgd"),
    "discriminator_optimizer.name": ("adamw", "sgd"),
    "schedule.name": ("poly", "constant", "plateau"),
    "alternation.name": ("simultaneous", "blocks"),
    "loss.adv_form": ("non_saturating", "saturating"),
    "loss.real_map": ("one_hot", "scaling"),
    "loss.map_resolution": ("output", "image"),
    "loss.ce_reduction": ("mean_valid", "sum"),
    "loss.adv_reduction": ("mean", "sum"),
    "tracking.wandb": ("auto", "online", "offline", "disabled"),
    "parallel.strategy": ("ddp", "fsdp", "deepspeed"),
}

# inclusive bounds; None: open
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "steps": (1, 10**9),
    "batch_size": (1, 10**6),
    "seed": (0, 2**31 - 1),
    "accumulate_steps": (1, 10**4),
    "ema_decay": (0, 0.99999),
    "max_skips": (1, None),
    "data.num_classes": (1, 255),
    "data.crop_px": (32, 4096),
    "data.scale_min": (0.05, 20),
    "data.scale_max": (0.05, 20),
    "data.rotate_degrees": (0, 180),
    "data.color_jitter": (0, 1),
    "data.blur_probability": (0, 1),
    "data.blur_max_px": (0.1, 100),
    "data.rare_class_temperature": (1e-4, None),
    "data.shuffle_block": (0, 10**6),
    "data.num_threads": (0, 256),
    "data.cache_bytes": (0, None),
    "data.keep_decoded_bytes": (0, None),
    "data.labelled_seed": (0, 2**31 - 1),
    "segmentor_optimizer.lr": (0, None),
    "segmentor_optimizer.encoder_lr_factor": (0, None),
    "segmentor_optimizer.bias_lr_factor": (0, None),
    "discriminator_optimizer.bias_lr_factor": (0, None),
    "segmentor_optimizer.beta1": (0, 0.99999),
    "segmentor_optimizer.beta2": (0, 0.99999),
    "segmentor_optimizer.clip_norm": (0, None),
    "segmentor_optimizer.weight_decay": (0, None),
    "discriminator_optimizer.lr": (0, None),
    "discriminator_optimizer.beta1": (0, 0.99999),
    "discriminator_optimizer.beta2": (0, 0.99999),
    "discriminator_optimizer.clip_norm": (0, None),
    "discriminator_optimizer.weight_decay": (0, None),
    "schedule.power": (0, None),
    "schedule.warmup_steps": (0, None),
    "schedule.plateau_factor": (0, 1),
    "schedule.plateau_patience": (1, None),
    "schedule.early_stop_patience": (0, None),
    "alternation.segmentor": (1, None),
    "alternation.discriminator": (1, None),
    "loss.adv_weight": (0, None),
    "loss.adv_start_step": (0, None),
    "loss.adv_warmup_steps": (0, None),
    "loss.real_target": (0.5, 1),
    "loss.scaling_tau": (0, 1),
    "semi.batch_size": (0, 10**6),
    "semi.weight": (0, None),
    "semi.threshold": (0, 1),
    "semi.start_step": (0, None),
    "semi.adv_weight": (0, None),
    "semi.adv_start_step": (0, None),
    "evaluate.every_steps": (0, None),
    "evaluate.window_px": (0, 10**5),
    "evaluate.overlap_px": (32, 10**5),
    "evaluate.num_pictures": (0, 64),
    "checkpoint.every_steps": (1, None),
    "checkpoint.keep_last": (1, None),
    "tracking.log_every": (1, None),
    "parallel.shard_size": (0, 10**6),
    "parallel.zero_stage": (0, 3),
    "parallel.timeout_seconds": (1, 10**6),
    "parallel.check_every": (0, None),
}
