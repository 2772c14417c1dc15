"""The configuration: typed parts, presets, command-line overrides, and every check that needs no data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from shards.errors import InputError

PRESETS = Path(__file__).parent / "presets"


@dataclass
class DataConfig:
    """Which samples, and how a training view is cut from them."""

    shards: str = ""  # directory written by `distseg pack` (manifest.json and *.tar)
    train_split: str = "train"
    val_split: str = "val"
    num_classes: int | None = None  # None: the manifest's; a number must agree with it
    crop_px: int = 240  # side of the square training view, pixels
    scale_min: float = 0.5  # the view's scale is log-uniform between these two
    scale_max: float = 1.5
    mirror: bool = True  # horizontal, with probability 1/2
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation changes, 0 to 1
    num_threads: int = 2  # decoding threads a rank; 0: in the training thread


@dataclass
class SegmentorConfig:
    """The network that predicts a class for every pixel; `segmentor=NAME` on the command line sets the name."""

    name: str = "deeplabv3plus_efficientnet_lite0"
    init: str = "imagenet"  # imagenet, random, or a file of weights
    batch_norm: str = "per_rank"  # per_rank: each rank's own batch statistics; frozen: the stored ones
    options: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the network


@dataclass
class DiscriminatorConfig:
    """The adversary; `discriminator=NAME` on the command line sets the name. Not built in supervised mode."""

    name: str = "two_branch"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """One network's optimizer; biases and other one-dimensional parameters are not decayed."""

    name: str = "adamw"  # adamw or sgd
    lr: float = 1e-3
    encoder_lr_factor: float = 1.0  # the encoder's rate is lr times this (segmentor only)
    weight_decay: float = 0.01
    beta1: float = 0.9  # adamw's first moment, sgd's momentum
    beta2: float = 0.999
    clip_norm: float = 5.0  # largest gradient norm; 0: not clipped


@dataclass
class ScheduleConfig:
    """The learning rate's course over the steps of the run, for both networks."""

    name: str = "poly"  # poly: (1 - step/steps)^power; constant
    power: float = 0.9  # Chen et al. 2016 (DeepLab), section 4.1
    warmup_steps: int = 0  # linear from 0, before and on top of the above


@dataclass
class AlternationConfig:
    """Who is updated at which step; the phase follows from the global step alone."""

    name: str = "simultaneous"  # simultaneous: both at every step (Hung et al. 2018); blocks (Luc et al. 2016)
    segmentor: int = 500  # blocks: steps of one segmentor block, which comes first
    discriminator: int = 500  # blocks: steps of one discriminator block


@dataclass
class LossConfig:
    """Weights and reductions; a weight means nothing without the reductions, so both are named."""

    adv_weight: float = 0.05  # lambda on the adversarial term; 0: the discriminator only watches
    ce_reduction: str = "mean_valid"  # mean over the valid pixels of the global batch, the only choice so far
    adv_reduction: str = "mean"  # mean over the discriminator's (valid) outputs of the global batch


@dataclass
class EvaluateConfig:
    """Full-resolution evaluation on the validation split."""

    every_steps: int = 0  # 0: only after the last step
    scales: list[float] = field(default_factory=lambda: [1.0])  # probabilities averaged over these
    mirror: bool = False  # and over the mirrored image
    num_pictures: int = 6  # validation images shown in pictures/ after the run


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 200
    keep_last: int = 2  # besides the best by validation mIoU


@dataclass
class TrackingConfig:
    """Where the curves go; metrics.jsonl in the run directory is always written."""

    wandb: str = "auto"  # auto: online with a login, else offline; online; offline; disabled
    project: str = "distseg"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_every: int = 10  # steps between two lines of metrics


@dataclass
class ParallelConfig:
    """How the networks are spread over the ranks."""

    strategy: str = "ddp"
    timeout_seconds: float = 300.0  # a rank waits no longer than this for the others


@dataclass
class Config:
    """Everything a run depends on. Saved in the run directory before the first step."""

    preset: str | None = None
    run_dir: str = ""  # default: runs/<preset>
    mode: str = "adversarial"  # adversarial or supervised
    steps: int = 1000  # updates in all (each of batch_size images)
    batch_size: int = 16  # GLOBAL: images per step over all ranks
    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one; cpu; cuda
    precision: str = "auto"  # auto: bf16 where the device computes in it, else fp32; bf16; fp32; fp64
    channels_last: bool = True
    ema_decay: float = 0.0  # moving average of the segmentor, used for evaluation; 0: off
    max_skips: int = 20  # stop after so many non-finite gradients in a row
    data: DataConfig = field(default_factory=DataConfig)
    segmentor: SegmentorConfig = field(default_factory=SegmentorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    segmentor_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    alternation: AlternationConfig = field(default_factory=AlternationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("adversarial", "supervised"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "bf16", "fp32", "fp64"),
    "segmentor.batch_norm": ("per_rank", "frozen"),
    "segmentor_optimizer.name": ("adamw", "sgd"),
    "discriminator_optimizer.name": ("adamw", "sgd"),
    "schedule.name": ("poly", "constant"),
    "alternation.name": ("simultaneous", "blocks"),
    "loss.ce_reduction": ("mean_valid",),
    "loss.adv_reduction": ("mean",),
    "tracking.wandb": ("auto", "online", "offline", "disabled"),
    "parallel.strategy": ("ddp",),
}

# inclusive bounds; None: open
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "steps": (1, None),
    "batch_size": (1, None),
    "seed": (0, 2**31 - 1),
    "ema_decay": (0, 0.99999),
    "max_skips": (1, None),
    "data.crop_px": (32, 4096),
    "data.scale_min": (0.05, 20),
    "data.scale_max": (0.05, 20),
    "data.color_jitter": (0, 1),
    "data.num_threads": (0, 256),
    "segmentor_optimizer.lr": (0, None),
    "segmentor_optimizer.encoder_lr_factor": (0, None),
    "segmentor_optimizer.clip_norm": (0, None),
    "segmentor_optimizer.weight_decay": (0, None),
    "discriminator_optimizer.lr": (0, None),
    "discriminator_optimizer.clip_norm": (0, None),
    "discriminator_optimizer.weight_decay": (0, None),
    "schedule.power": (0, None),
    "schedule.warmup_steps": (0, None),
    "alternation.segmentor": (1, None),
    "alternation.discriminator": (1, None),
    "loss.adv_weight": (0, None),
    "evaluate.every_steps": (0, None),
    "evaluate.num_pictures": (0, 64),
    "checkpoint.every_steps": (1, None),
    "checkpoint.keep_last": (1, None),
    "tracking.log_every": (1, None),
    "parallel.timeout_seconds": (1, None),
}

# These may change when a run is resumed: they alter neither the networks nor the order of samples.
FREE_ON_RESUME = frozenset(
    {"run_dir", "device", "data.shards", "data.num_threads", "max_skips"}
    | {"evaluate", "checkpoint", "tracking", "parallel"}
)


def preset_names() -> list[str]:
    """Names that `preset=` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(overrides: list[str]) -> Config:
    """Defaults, then the preset, then `key=value` overrides; checked, so that what comes back can be run.

    Raises InputError for an unknown preset or key (naming the nearest), a value of the wrong type or outside
    its choices or bounds.
    """
    pairs = [_split(item) for item in overrides]
    presets = [value for key, value in pairs if key == "preset"]
    merged = OmegaConf.structured(Config)
    if presets:
        merged = _merge(merged, _preset_values(presets[-1]))
    return _override(merged, pairs)


def override(config: Config, overrides: list[str]) -> Config:
    """A configuration with `key=value` overrides on top. Raises InputError as `load` does."""
    return _override(OmegaConf.structured(config), [_split(item) for item in overrides])


def _override(merged: Any, pairs: list[tuple[str, str]]) -> Config:
    for key, value in pairs:
        key = _full_key(key)
        if key in ("segmentor.name", "discriminator.name") and value != OmegaConf.select(merged, key):
            OmegaConf.update(merged, key.replace(".name", ".options"), {}, merge=False)  # they were the other's
        merged = _merge(merged, {key: _parse(key, value)})
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    config.run_dir = config.run_dir or f"runs/{config.preset or 'run'}"
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the classes above."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def from_file(path: Path) -> Config:
    """The configuration that a run saved. Raises InputError when it is not one of this version."""
    if not path.is_file():
        raise InputError(f"no {path}", "a run directory of distseg (with config.yaml)", "check the path of the run")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(
            f"{path}: {_first_line(error)}", "a configuration of this version", "start a new run"
        ) from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configurations and must not when a run is resumed."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys if not _is_free(key)}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)


def _split(item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise InputError(f"argument {item!r}", "key=value", "write for example steps=500 or loss.adv_weight=0.01")
    return key, value


def _parse(key: str, value: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
    except YAMLError:
        raise InputError(f"{key}={value}", "a YAML value", f"correct {key}") from None


def _preset_values(name: str) -> dict[str, Any]:
    path = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        raise InputError(f"preset={name}", f"one of: {', '.join(preset_names())}", _nearest(name, preset_names()))
    return _flat(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]


def _full_key(key: str) -> str:
    """`segmentor=NAME` is short for `segmentor.name=NAME`, for every part that has a name."""
    sections = {section for section in _flat(to_dict(Config())) if section.endswith(".name")}
    return f"{key}.name" if f"{key}.name" in sections else key


def _merge(config: Any, values: dict[str, Any]) -> Any:
    known = list(_flat(to_dict(Config())))
    for key, value in values.items():
        is_option = any(key.startswith(f"{part}.options.") for part in ("segmentor", "discriminator"))
        if not is_option and key not in known:
            raise InputError(f"unknown key {key!r}", "a key of the configuration", _nearest(key, known))
        try:
            OmegaConf.update(config, key, value, merge=True)
        except (OmegaConfBaseException, ValueError) as error:
            needed = OmegaConf.select(OmegaConf.structured(Config), key)
            kind = "a value of the field's type" if needed is None else f"a value like {needed!r}"
            raise InputError(f"{key}={value}: {_first_line(error)}", kind, f"correct {key}") from None
    return config


def _check(config: Config) -> None:
    values = _flat(to_dict(config))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise InputError(f"{key}={values[key]}", f"one of: {', '.join(choices)}", _nearest(values[key], choices))
    for key, (low, high) in BOUNDS.items():
        value = values[key]
        # written so that NaN fails too
        if not ((low is None or value >= low) and (high is None or value <= high) and value < float("inf")):
            bounds = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
            raise InputError(f"{key}={value}", f"a number from {bounds}", f"correct {key}")
    if config.data.scale_min > config.data.scale_max:
        got = f"data.scale_min={config.data.scale_min} above data.scale_max={config.data.scale_max}"
        raise InputError(got, "scale_min <= scale_max", "swap them")
    if not config.evaluate.scales or min(config.evaluate.scales) <= 0:
        got = f"evaluate.scales={config.evaluate.scales}"
        raise InputError(got, "at least one positive scale", "write for example evaluate.scales=[0.75,1,1.25]")
    if not config.data.shards:
        action = "write data.shards=DIR (`distseg prepare` and `distseg pack` make one)"
        raise InputError("no data.shards", "a directory of packed shards", action)


def _nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    names = difflib.get_close_matches(word, choices, n=1, cutoff=0.3)
    last = word.rsplit(".", 1)[-1]
    same_field = [choice for choice in choices if choice.rsplit(".", 1)[-1] == last]
    nearest = same_field[:1] or names
    return f"did you mean {nearest[0]}?" if nearest else f"choose one of: {', '.join(choices)}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keyed by dotted names; empty dictionaries are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
