"""`loss`, `semi`, `consistency` and `adaptation`: what the networks are trained for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distseg.config.forms import DEFAULT, FORMS
from distseg.config.keys import key
from distseg.config.schema.common import (
    ADVENT,
    HUNG,
    LUC,
    SEMI_SUPERVISED,
    UNIMATCH,
    WITH_DISCRIMINATOR,
    WITH_GROUND_TRUTH,
)


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
        DEFAULT,
        "the losses on the discriminator's scores s, > 0 = real; D is sigmoid(s), under "
        "least_squares (1 + s) / 2",
        choices={name: form.meaning for name, form in FORMS.items()},
        source=f"saturating: {LUC}, eq. 3; hinge: Lim and Ye 2017; least_squares: Mao et al. 2017, "
        "eq. 9",
        modes=WITH_DISCRIMINATOR,
    )
    feature_weight: float = key(
        0.0,
        "of feature matching: the sum over the discriminator's features of the distance between "
        "their mean over ground truth and their mean over predictions (of unlabelled images where "
        "there are any); 0: off",
        low=0,
        source="Salimans et al. 2016, section 3.1; Mittal et al. 2019 (s4GAN)",
        modes=WITH_GROUND_TRUTH,
    )
    mismatched_weight: float = key(
        0.0,
        "w: the discriminator also learns to call (image, ground truth of its neighbour in the "
        "batch) fake; its loss is real + (1 - w) x fake + w x mismatched",
        low=0,
        high=0.99,
        source="Reed et al. 2016, algorithm 1; there: 0.5",
        modes=WITH_GROUND_TRUTH,
    )
    # second order: only ddp's backward goes through a gradient
    r1_weight: float = key(
        0.0,
        "gamma of the R1 penalty in the discriminator's loss: gamma / 2 x the squared gradient of "
        "its score at real label maps, the mean over images; parallel.strategy=ddp only; 0: off",
        low=0,
        source="Mescheder et al. 2018, eq. 9",
        modes=WITH_GROUND_TRUTH,
    )
    r1_every: int = key(
        1,
        "only in every so many updates of the discriminator, and then times as many",
        unit="updates",
        low=1,
        high=10**6,
        source="Karras et al. 2020 (StyleGAN2), section 3.1; there: 16",
        modes=WITH_GROUND_TRUTH,
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
        "adv_weight and feature_weight rise linearly over so many steps from adv_start_step on",
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
        modes=WITH_GROUND_TRUTH,
    )
    scaling_tau: float = key(
        0.9,
        "scaling: at least this mass stays on the true class",
        low=0,
        high=1,
        source=LUC,
        modes=WITH_GROUND_TRUTH,
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
    # a word or a list, which no type of OmegaConf's can say; rules/ checks it
    class_weights: Any = key(
        "none",
        "what a pixel of each class counts in the cross entropy: a number for every class, in "
        "their order; balanced: all pixels / (classes x pixels of the class); median_frequency: "
        "the median of the classes' frequencies / the class's, in the images that show it; both "
        "by the labelled training images",
        source="balanced: scikit-learn; median_frequency: Eigen and Fergus 2015, section 6.2",
    )
    logit_adjustment: float = key(
        0.0,
        "t: t log(share of the class among labelled pixels) is added to the logits in the cross "
        "entropy, so that the logits themselves favour no class for being frequent; 0: off",
        low=0,
        high=2,
        source="Menon et al. 2021, eq. 10",
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
    """Terms on unlabelled images; the adversary's are those of Hung et al. 2018, eq. 4 and 5."""

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
    entropy_weight: float = key(
        0.0,
        "of the entropy of predictions, as a share of its largest value: low where the segmentor "
        "is sure; 0: off",
        low=0,
        source="Grandvalet and Bengio 2004; Vu et al. 2019 (MinEnt), there 0.001",
    )
    entropy_start_step: int = key(0, "of that term", unit="steps", low=0)
    entropy_warmup_steps: int = key(
        0,
        "entropy_weight rises linearly over so many steps from entropy_start_step on",
        unit="steps",
        low=0,
    )
    discriminate: bool = key(
        True, "the discriminator learns from their label maps too", modes=SEMI_SUPERVISED
    )


@dataclass
class ConsistencyConfig:
    """Weak-to-strong consistency: what a teacher sees in a crop trains its strongly changed view,
    which `strong` describes.
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
    batch_norm: str = key(
        "auto",
        "what normalises strong views in training",
        choices={
            "auto": "separate; joint with data.unlabelled_shards, whose images may be of the kind "
            "that is predicted later",
            "separate": "their own statistics; the running ones, by which the network predicts, "
            "are of the labelled images alone",
            "joint": "the statistics of all images, which running statistics are of too",
        },
        source="separate: Yuan et al. 2021, DSBN, with one scale and shift for both",
    )
    held_out: int = key(
        0,
        "so many labelled images are not trained on: at each evaluation the teacher labels them, "
        "and the metrics held_out/... say how right it is; 0: none",
        unit="images",
        low=0,
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
    # a student of argmaxes forgets what its teacher is never sure of
    logit_adjustment: float = key(
        0.0,
        "t: the teacher's logits are raised by - t log(share of the class among labelled pixels), "
        "so that rare classes are not lost from pseudo-labels; 0: off",
        low=0,
        high=2,
        source="Menon et al. 2021, section 4.1; of pseudo-labels Wang et al. 2022 (DebiasPL)",
    )
    alignment: float = key(
        0.0,
        "r: after each step the teacher's logits of a class are raised by r log(its share of the "
        "labelled pixels / its running share of the pseudo-labels), so that these have classes as "
        "often as the labels; 0: off",
        low=0,
        high=1,
        source="ours, after the distribution alignment of Berthelot et al. 2020 (ReMixMatch)",
    )
    # in both cases by the place in the global batch, so any number of ranks mixes the same
    mix_with: str = key(
        "unlabelled",
        "what strong views are mixed with, by strong.mix",
        choices={
            "unlabelled": "each other, in pairs",
            "labelled": "the labelled images of the step, with their labels, as many as these",
        },
        source="labelled: Tranheden et al. 2021 (DACS)",
    )
    # of the same pseudo-labels: the teacher's forward is done once for all
    num_views: int = key(
        1,
        "strong views of each unlabelled image, all trained on; the term is their mean",
        low=1,
        high=8,
        source=f"{UNIMATCH}, there 2",
    )
    # the share of channels is no key: both papers have one half
    feature_perturbation: str = key(
        "none",
        "channels of the encoder's features that are left out on their way to the head, half of "
        "them; of segmentors HEAD_ENCODER and DeepLabs",
        choices={
            "none": "no channel",
            "dropout": "of the weak view, which is trained on as well: it weighs as much as all "
            "strong views",
            "complementary": "of two strong views the one lacks what the other has, in half of the "
            "images",
        },
        source=f"dropout: {UNIMATCH}; complementary: Yang et al. 2025 (UniMatch V2)",
    )
    # early, a discriminator's scores say nothing: rules/ asks for it to have begun before
    gate: str = key(
        "none",
        "which images are pseudo-labelled, by D's score of what the teacher predicts",
        choices={
            "none": "all",
            "score": "those that it takes for real with gate_probability",
            "rank": "the share gate_share of the global batch that it takes for the most real",
        },
        source="score: Mittal et al. 2019 (s4GAN), eq. 5, of the segmentor's own prediction",
    )
    gate_probability: float = key(
        0.6, "gate=score: an image counts above this", low=0, high=1, source="s4GAN, on PASCAL VOC"
    )
    # relative: a discriminator that trusts all, or none, chooses all the same
    gate_share: float = key(0.5, "gate=rank: so many of the images count", low=0, high=1)


@dataclass
class AdaptationConfig:
    """From one domain, which has labels, to another (Tsai et al. 2018): the discriminator tells
    predictions on the one from predictions on the other, and never sees ground truth. The weight of
    its term is `loss.adv_weight`.
    """

    input: str = key(
        "probabilities",
        "what the discriminator sees of a prediction p",
        choices={
            "probabilities": "p",
            "self_information": "- p log p / log C of each of the C classes: how unsure it is",
        },
        source=f"probabilities: Tsai et al. 2018 (AdaptSegNet); self_information: {ADVENT}, eq. 8",
    )
    # here and not consistency.batch_norm, as the target is what the network is to predict
    batch_norm: str = key(
        "joint",
        "what normalises both domains' images in training, with a teacher too",
        choices={
            "joint": "the statistics of all images, which running statistics are of too",
            "separate": "each domain's own; running statistics, by which the network predicts, are "
            "of the unlabelled images, where a step sees any",
        },
        source="separate: Li et al. 2016 (AdaBN); Chang et al. 2019 (DSBN), with one scale and "
        "shift for both",
    )
    aux_adv_weight: float = key(
        0.0,
        "of the adversarial term on the segmentor's auxiliary output, which a second discriminator "
        "of its own judges; 0: there is none",
        low=0,
        source="Tsai et al. 2018, in whose code 0.0002 beside loss.adv_weight=0.001 and "
        "loss.aux_weight=0.1",
    )
