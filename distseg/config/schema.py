"""The configuration as typed sections: every key with its default, meaning, unit and rules.

What `key()` takes is in keys.py. Rules between several keys are in rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distseg.config.keys import key, section

MAX_SEED = 2**31 - 1  # what every library's generator takes
MAX_BETA = 0.99999  # of moving averages: at 1 nothing new would come in
WITH_DISCRIMINATOR = ("adversarial", "semi_supervised")  # modes
SEMI_SUPERVISED = ("semi_supervised",)
WITH_UNLABELLED = ("semi_supervised", "consistency")

HUNG = "Hung et al. 2018"
LUC = "Luc et al. 2016"
UNIMATCH = "Yang et al. 2023 (UniMatch)"

# as distseg/models has them, which needs torch: so a misspelt one is told at once
SEGMENTORS = (
    *("deeplabv2_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("deeplabv3_efficientnet_lite0", "deeplabv3plus_resnet50", "deeplabv3plus_resnet101"),
    *("deeplabv3plus_efficientnet_lite0", "fcn32s_vgg16", "fcn16s_vgg16", "fcn8s_vgg16"),
    *("fcn8s_atonce_vgg16", "dilated8_vgg16", "multiscale"),
)
DISCRIMINATORS = (
    *("two_branch", "fully_convolutional", "large_fov", "large_fov_light"),
    *("small_fov", "small_fov_light"),
)


@dataclass
class DataConfig:
    """Which samples, and how a training crop is cut from them."""

    # may change: a run is held to the manifest's sha256, so the same shards may lie elsewhere
    shards: str = key(
        "",
        "directory written by `distseg pack` (manifest.json and *.tar), or its http, s3 or gs URL",
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


@dataclass
class SegmentorConfig:
    """The network that predicts a class for every pixel.

    `segmentor=NAME` on the command line sets the name.
    """

    name: str = key(
        "deeplabv3plus_efficientnet_lite0",
        "which network: one that `distseg models` lists, or your own, as path/to/file.py:name or "
        "package.module:name",
        choices=SEGMENTORS,
        own_code=True,
    )
    init: str = key(
        "imagenet",
        "first weights: imagenet; random; a file of weights; a run directory, of which RUN@last, "
        "RUN@best and RUN@500 name a checkpoint, and RUN the best, or the last where none was "
        "scored (EMA weights where there are); parts for another number of classes are made anew",
    )
    # off: weights of another network would load a few tensors, and pass for a good start
    init_partial: bool = key(
        False, "accept weights that lack more than a quarter of the tensors, which stay random"
    )
    # patterns of names, as they stand in a checkpoint: no list of parts for every network
    freeze: list[str] = key(
        [],
        "parts that are not trained, by patterns of parameters' names: encoder, or "
        '[encoder.layer1,"*.bias"]; batch normalisation in them keeps its statistics',
    )
    # per rank by default: synchronised waits for all ranks in every layer, forward and backward
    batch_norm: str = key(
        "per_rank",
        "whose statistics normalise in training",
        choices={
            "per_rank": "those of the rank's images",
            "frozen": "the stored ones",
            "synchronised": "those of all ranks' images",
        },
    )
    # free in form, as each network has its own; checked against its constructor when it is built
    options: dict[str, Any] = key({}, "further keyword arguments of the network")


@dataclass
class DiscriminatorConfig:
    """The adversary; `discriminator=NAME` on the command line sets the name.

    Not built in supervised mode.
    """

    name: str = key(
        "two_branch",
        "which network: one that `distseg models` lists, or your own, as path/to/file.py:name or "
        "package.module:name",
        choices=DISCRIMINATORS,
        own_code=True,
    )
    init: str = key(
        "random", "first weights: random; a file of weights; a run directory, as in segmentor.init"
    )
    options: dict[str, Any] = key({}, "further keyword arguments of the network")


@dataclass
class OptimizerConfig:
    """One network's optimizer; biases and other one-dimensional parameters are not decayed."""

    name: str = key("adamw", "the update rule", choices=("adamw", "sgd"))
    lr: float = key(1e-3, "learning rate, before the schedule", low=0)
    # below 1 where the encoder is pretrained and the rest is not
    encoder_lr_factor: float = key(
        1.0, "the encoder's rate is lr times this (segmentor only)", low=0
    )
    bias_lr_factor: float = key(
        1.0,
        "the rate of biases is their layer's times this; 2 in the source",
        low=0,
        source="FCN, Long et al. 2015, section 4.3",
    )
    nesterov: bool = key(False, "Nesterov momentum; sgd only")
    # of one-dimensional parameters none: shrinking a norm's scale regularises nothing
    weight_decay: float = key(0.01, "of weights with two and more dimensions", low=0)
    beta1: float = key(0.9, "adamw's first moment, sgd's momentum", low=0, high=MAX_BETA)
    beta2: float = key(0.999, "adamw's second moment", low=0, high=MAX_BETA)
    # of the gradient averaged over all ranks, so it means the same for any number of them
    clip_norm: float = key(5.0, "largest gradient norm; 0: not clipped", low=0)


@dataclass
class ScheduleConfig:
    """The learning rate's course over the steps of the run, for both networks."""

    name: str = key(
        "poly",
        "its form",
        choices={
            "poly": "(1 - step / steps) ^ power",
            "constant": "the optimizer's lr all the time",
            "plateau": "multiplied by plateau_factor whenever val/loss has stopped falling",
        },
    )
    power: float = key(0.9, "of poly", low=0, source="DeepLab, Chen et al. 2016, section 4.1")
    warmup_steps: int = key(
        0, "linear from 1/warmup_steps, on top of the above", unit="steps", low=0
    )
    plateau_factor: float = key(0.5, "plateau: the rate is multiplied by this ...", low=0, high=1)
    # in evaluations, as there is no loss to judge by between two of them
    plateau_patience: int = key(
        3,
        "... after so many evaluations in a row without a lower val/loss",
        unit="evaluations",
        low=1,
    )
    # never by default: runs that are compared should have as many steps
    early_stop_patience: int = key(
        0,
        "the run ends after so many such evaluations, under any schedule; 0: never",
        unit="evaluations",
        low=0,
    )


@dataclass
class AlternationConfig:
    """Who is updated at which step; the phase follows from the global step alone."""

    name: str = key(
        "simultaneous",
        "which networks a step updates",
        choices={
            "simultaneous": f"both at every step ({HUNG})",
            "blocks": f"some steps of one network, then some of the other ({LUC})",
        },
    )
    # the segmentor first: of random label maps a discriminator would learn nothing of use
    segmentor: int = key(
        500, "blocks: length of a segmentor block, which comes first", unit="steps", low=1
    )
    discriminator: int = key(500, "blocks: length of a discriminator block", unit="steps", low=1)


@dataclass
class TermConfig:
    """A further term of the segmentor's loss; see `loss.terms`."""

    # plain fields: keys inside of a dictionary have no names of their own to be listed by
    use: str = ""
    weight: float = 1.0
    start_step: int = 0
    warmup_steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """Weights and reductions; a weight means nothing without the reductions, so both are named."""

    adv_weight: float = key(
        0.05,
        "lambda on the adversarial term; 0: the discriminator only watches",
        low=0,
        modes=WITH_DISCRIMINATOR,
    )
    # non-saturating: it has a gradient where the discriminator is sure
    adv_form: str = key(
        "non_saturating",
        "the losses on the discriminator's scores s, > 0 = real; D is sigmoid(s), under "
        "least_squares (1 + s) / 2",
        choices={
            "non_saturating": "BCE; the segmentor's is BCE(D(fake), real)",
            "saturating": "BCE; the segmentor's is - BCE(D(fake), fake)",
            "hinge": "max(0, 1 - s) of real, max(0, 1 + s) of fake; the segmentor's is - s",
            "least_squares": "(D - 1)^2 of real, D^2 of fake; the segmentor's is (D - 1)^2",
        },
        source=f"saturating: {LUC}, eq. 3; hinge: Lim and Ye 2017; least_squares: Mao et al. 2017, "
        "eq. 9",
        modes=WITH_DISCRIMINATOR,
    )
    # by the global step, which every rank knows: none decides for itself
    adv_start_step: int = key(
        0,
        "before it there is no adversary: plain supervised steps, the discriminator untouched",
        unit="steps",
        low=0,
        modes=WITH_DISCRIMINATOR,
    )
    adv_warmup_steps: int = key(
        0,
        "adv_weight rises linearly over so many steps from adv_start_step on",
        unit="steps",
        low=0,
        modes=WITH_DISCRIMINATOR,
    )
    # one-sided: a target above 0 for fakes would reward what the segmentor does already
    real_target: float = key(
        1.0,
        "the discriminator's target for real label maps; 0.9: one-sided label smoothing",
        low=0.5,
        high=1,
        source="Salimans et al. 2016, section 3.4",
        modes=WITH_DISCRIMINATOR,
    )
    # one-hot maps are told from probabilities by their values alone; scaling takes that away
    real_map: str = key(
        "one_hot",
        "ground truth as the discriminator sees it",
        choices={
            "one_hot": "1 for the true class, 0 for the others",
            "scaling": "softened: scaling_tau or more for the true class",
        },
        source=f"scaling: {LUC}",
        modes=WITH_DISCRIMINATOR,
    )
    scaling_tau: float = key(
        0.9,
        "scaling: at least this mass stays on the true class",
        low=0,
        high=1,
        source=LUC,
        modes=WITH_DISCRIMINATOR,
    )
    # output: at full size a two-branch discriminator costs more than the segmentor
    map_resolution: str = key(
        "output",
        "size of the label maps that the discriminator sees",
        choices={
            "output": f"the segmentor's output ({LUC})",
            "image": f"the training crop ({HUNG})",
        },
        modes=WITH_DISCRIMINATOR,
    )
    ce_weight: float = key(1.0, "of the cross entropy; 0: the loss is without it", low=0)
    # a word or a list, which no type of OmegaConf's can say; rules.py checks it
    class_weights: Any = key(
        "none",
        "what a pixel of each class counts in the cross entropy: a number for every class, in "
        "their order; balanced: all pixels / (classes x pixels of the class); median_frequency: "
        "the median of the classes' frequencies / the class's, in the images that show it; both "
        "by the labelled training images",
        source="balanced: scikit-learn; median_frequency: Eigen and Fergus 2015, section 6.2",
    )
    # below 1, where nothing of the truth would be left
    label_smoothing: float = key(
        0.0,
        "share of the cross entropy's target that is spread evenly over the classes",
        low=0,
        high=0.99,
        source="Szegedy et al. 2016, section 7",
    )
    focal_gamma: float = key(
        0.0,
        "focal loss: a pixel counts (1 - p)^gamma, p its true class's probability; 0: off",
        low=0,
        high=10,
        source="Lin et al. 2017, eq. 4; there: 2",
    )
    ohem_threshold: float = key(
        0.0,
        "online hard example mining: only pixels whose true class has a lower probability count; "
        "0: off; 0.7 is usual",
        low=0,
        high=1,
        source="Shrivastava et al. 2016, for pixels",
    )
    # or a good network would end with no pixel, and so no gradient, in some images
    ohem_min_share: float = key(
        0.0625,
        "with ohem_threshold: of each image at least this share of its pixels counts, the hardest",
        low=0,
        high=1,
    )
    aux_weight: float = key(
        0.4,
        "of the cross entropy of an auxiliary head, where the segmentor has one",
        low=0,
        source="Zhao et al. 2017 (PSPNet)",
    )
    # by name, so that each has metrics of its own, and an override can reach into one
    terms: dict[str, TermConfig] = key(
        {},
        "further terms by name: loss.terms.dice=0.5, or loss.terms.NAME={use: dice, weight: 0.5, "
        "start_step: 0, warmup_steps: 0, options: {smooth: 1}}; use is dice, lovasz, or "
        "module:name or file.py:name of your own (default: the name); the weight rises linearly "
        "over warmup_steps from start_step on",
    )
    # the mean is over ALL ranks' pixels: ranks' own means, averaged, weigh pixels by their rank
    ce_reduction: str = key(
        "mean_valid",
        "of the cross entropy",
        choices={
            "mean_valid": "mean over the valid pixels of the global batch",
            "sum": "their sum per image",
        },
    )
    adv_reduction: str = key(
        "mean",
        "of the adversarial and the discriminator's term",
        choices={
            "mean": "mean over the discriminator's (valid) outputs of the global batch",
            "sum": "their sum per image",
        },
        modes=WITH_DISCRIMINATOR,
    )


@dataclass
class SemiConfig:
    """The adversary's terms on unlabelled images (Hung et al. 2018, eq. 4 and 5)."""

    # over all ranks, so that a run on other hardware is the same run
    batch_size: int = key(
        0,
        "GLOBAL: unlabelled images a step; 0: as many as labelled ones",
        unit="images",
        low=0,
        high=10**6,
    )
    weight: float = key(
        0.1,
        "lambda_semi on the masked cross entropy",
        low=0,
        source=HUNG,
        modes=SEMI_SUPERVISED,
    )
    threshold: float = key(
        0.2,
        "T_semi: a pixel is in the confidence mask where D(fake) is above it",
        low=0,
        high=1,
        source=f"{HUNG}, eq. 5",
        modes=SEMI_SUPERVISED,
    )
    # late: pseudo-labels of an untrained segmentor teach it its own errors
    start_step: int = key(
        5000,
        "of the masked cross entropy",
        unit="steps",
        low=0,
        source=HUNG,
        modes=SEMI_SUPERVISED,
    )
    adv_weight: float = key(
        0.001,
        "lambda on the adversarial term of unlabelled images",
        low=0,
        source=f"{HUNG}, eq. 4",
        modes=SEMI_SUPERVISED,
    )
    adv_start_step: int = key(
        0,
        "of that term, not before loss.adv_start_step",
        unit="steps",
        low=0,
        modes=SEMI_SUPERVISED,
    )
    discriminate: bool = key(
        True, "the discriminator learns from their label maps too", modes=SEMI_SUPERVISED
    )


@dataclass
class ConsistencyConfig:
    """Weak-to-strong consistency: what a teacher sees in a crop trains its strongly changed view.

    The defaults of the strong view are UniMatch's (Yang et al. 2023).
    """

    weight: float = key(0.0, "of the term on unlabelled images; 0: there is none", low=0)
    # early pseudo-labels teach the segmentor its own errors
    start_step: int = key(0, "of the term", unit="steps", low=0)
    warmup_steps: int = key(
        0, "weight rises linearly over so many steps from start_step on", unit="steps", low=0
    )
    teacher: str = key(
        "ema",
        "whose prediction of the weak view (crop, scale and flip alone) is the pseudo-label",
        choices={
            "ema": "the EMA of the segmentor's weights, see ema_decay",
            "segmentor": "the segmentor itself, as it stands",
        },
        source=f"ema: Tarvainen and Valpola 2017; segmentor: {UNIMATCH}",
    )
    target: str = key(
        "class",
        "what the strong view is held to",
        choices={
            "class": "the teacher's class, by cross entropy",
            "probabilities": "the teacher's probabilities, by their mean squared difference",
        },
        source="class: Sohn et al. 2020 (FixMatch); probabilities: Tarvainen and Valpola 2017",
    )
    threshold: float = key(
        0.95,
        "a pixel is confident where the teacher's largest probability is at least this",
        low=0,
        high=1,
        source=UNIMATCH,
    )
    weighting: str = key(
        "pixel",
        "what the confident pixels decide; the sum is divided by all pixels inside of images",
        choices={
            "pixel": "only they count",
            "image": "all pixels of an image count as much as its share of confident ones",
        },
        source=f"pixel: {UNIMATCH}; image: Olsson et al. 2021 (ClassMix)",
    )
    # partners are neighbours in the global batch, so any number of ranks mixes the same pairs
    mix: str = key(
        "cutmix",
        "what is laid over a strong view, teacher's prediction included",
        choices={
            "cutmix": "a rectangle of another image",
            "classmix": "half of the classes of another image",
            "cutout": "an empty rectangle, which does not count",
            "none": "",
        },
        source="Yun et al. 2019, Olsson et al. 2021, DeVries and Taylor 2017",
    )
    mix_probability: float = key(0.5, "of mixing, for each image", low=0, high=1)
    mix_area_min: float = key(
        0.02, "smallest share of a crop that a rectangle takes", low=0, high=1
    )
    mix_area_max: float = key(0.4, "largest share", low=0, high=1)
    jitter_probability: float = key(0.8, "of changing an image's colours", low=0, high=1)
    color_jitter: float = key(
        0.5, "brightness, contrast and saturation by factors in 1 -+ this", low=0, high=1
    )
    hue_jitter: float = key(
        0.25, "hue by up to this", unit="turns of the colour circle", low=0, high=0.5
    )
    gray_probability: float = key(0.2, "of leaving an image its gray alone", low=0, high=1)
    blur_probability: float = key(0.5, "of blurring an image", low=0, high=1)
    blur_max_px: float = key(
        2.0, "largest standard deviation of that", unit="pixels", low=0.1, high=20
    )


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
    # so there each key says for itself what may change; the last four do not.
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
    evaluate: EvaluateConfig = section(
        EvaluateConfig, on_resume=True, at_evaluation=True, at_prediction=True
    )
    checkpoint: CheckpointConfig = section(CheckpointConfig, on_resume=True)
    tracking: TrackingConfig = section(TrackingConfig, on_resume=True)
    parallel: ParallelConfig = section(ParallelConfig, on_resume=True, at_evaluation=True)
