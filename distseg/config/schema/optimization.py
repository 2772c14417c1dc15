"""`segmentor_optimizer`, `discriminator_optimizer`, `schedule` and `alternation`."""

from __future__ import annotations

from dataclasses import dataclass

from distseg.config.keys import key
from distseg.config.schema.common import HUNG, LUC, MAX_BETA


@dataclass
class OptimizerConfig:
    """One network's optimizer; biases and other one-dimensional parameters are not decayed."""

    name: str = key("adamw", "the update rule", choices=("adamw", "sgd"))
    lr: float = key(1e-3, "learning rate, before the schedule", low=0)
    # below 1 where the encoder is pretrained and the rest is not
    encoder_lr_factor: float = key(
        1.0, "the encoder's rate is lr times this (segmentor only)", low=0
    )
    # of each layer: a transformer's early layers are the ones that fine-tuning spoils first
    layer_decay: float = key(
        1.0,
        "the rate of a layer of the encoder is times this, once for each layer between it and the "
        "head (segmentor only; vision transformers, MiT, ConvNeXt); 1: off",
        low=0.1,
        high=1,
        source="BEiT, Bao et al. 2022, appendix",
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
