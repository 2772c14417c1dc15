"""Rules of the networks and of how they are optimised."""

from __future__ import annotations

from distseg.config.schema import WITH_DISCRIMINATOR, Config, OptimizerConfig
from shards.errors import InputError


def options_of_the_network_alone(config: Config) -> None:
    """No option stands in for what the package gives to each network by itself."""
    # an option would take the place of the key that is checked and recorded
    given = ("name", "num_classes", "init", "init_partial")
    for section, options in (
        ("segmentor", config.segmentor.options),
        ("discriminator", config.discriminator.options),
    ):
        for name in given:
            if name in options:
                got, action = f"{section}.options.{name}", f"remove {section}.options.{name}"
                raise InputError(got, f"options other than {', '.join(given)}", action)


def frozen_statistics_are_trained(config: Config) -> None:
    """Batch normalisation is frozen only where weights come with statistics."""
    if config.segmentor.batch_norm == "frozen" and config.segmentor.init == "random":
        got = "segmentor.batch_norm=frozen with segmentor.init=random"
        needed = "stored statistics; those of random weights let deep networks explode"
        action = "write segmentor.batch_norm=per_rank, or segmentor.init=FILE"
        raise InputError(got, needed, action)


def spectral_norm_of_whole_weights(config: Config) -> None:
    """A discriminator's spectral norm is computed of its parameters, which are whole under ddp."""
    asked = config.discriminator.options.get("spectral_norm")
    strategy = config.parallel.strategy
    if config.mode in WITH_DISCRIMINATOR and asked and strategy != "ddp":
        got = f"discriminator.options.spectral_norm={asked} with parallel.strategy={strategy}"
        needed = "parallel.strategy=ddp: the others exchange a layer's gradient when its backward "
        needed += "is done, and the norm's comes after it"
        action = "write parallel.strategy=ddp, or remove the option"
        raise InputError(got, needed, action)


def no_encoder_in_the_discriminator(config: Config) -> None:
    """encoder_lr_factor is of the segmentor's optimizer only."""
    factor = config.discriminator_optimizer.encoder_lr_factor
    # both optimizers have the same keys, and this one would be passed over in silence
    if factor != 1:
        got = f"discriminator_optimizer.encoder_lr_factor={factor}"
        needed = "1: a discriminator has no encoder"
        raise InputError(got, needed, "set discriminator_optimizer.lr alone")


def nesterov_has_a_momentum(config: Config) -> None:
    """Nesterov's is a form of sgd's momentum, for either network."""
    _check_nesterov("segmentor_optimizer", config.segmentor_optimizer)
    _check_nesterov("discriminator_optimizer", config.discriminator_optimizer)


def _check_nesterov(section: str, optimizer: OptimizerConfig) -> None:
    # adamw would ignore it, and torch's sgd refuses it only when it is made
    if optimizer.nesterov and not (optimizer.name == "sgd" and optimizer.beta1 > 0):
        needed = f"{section}.name=sgd with a momentum ({section}.beta1) above 0"
        raise InputError(f"{section}.nesterov=true", needed, f"correct {section}")


def evaluations_for_the_schedule(config: Config) -> None:
    """What goes by the validation loss needs evaluations."""
    # otherwise the rate would stay as it is for the whole run, without a word
    if goes_by_loss(config) and not config.evaluate.every_steps:
        needed = (
            "evaluations: schedule.name=plateau and schedule.early_stop_patience go by their loss"
        )
        action = "write for example evaluate.every_steps=100"
        raise InputError("evaluate.every_steps=0", needed, action)


def goes_by_loss(config: Config) -> str:
    """The key, with its value, by which the loss of validation decides on a run's course; "" where
    it does not.
    """
    schedule = config.schedule
    if schedule.name == "plateau":
        return "schedule.name=plateau"
    patience = schedule.early_stop_patience
    return f"schedule.early_stop_patience={patience}" if patience else ""


RULES = (
    options_of_the_network_alone,
    frozen_statistics_are_trained,
    spectral_norm_of_whole_weights,
    no_encoder_in_the_discriminator,
    nesterov_has_a_momentum,
    evaluations_for_the_schedule,
)
