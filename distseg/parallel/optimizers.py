"""One optimizer per network.

Parameter groups, eagerly made state, and a step that skips non-finite gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from distseg.config.schema import OptimizerConfig
from distseg.models.levels import Encoder
from shards.errors import InputError


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Groups by encoder or head, by layer of the encoder where layers have rates of their own,
    decayed or not (biases and norms are not), bias or not.

    No parameter twice. Raises InputError for config.layer_decay of an encoder that does not number
    its layers.
    """
    layers = _layers_above(network, config.layer_decay)
    groups: dict[tuple[int | None, bool, bool], dict] = {}
    for name, parameter in network.named_parameters():  # lists a shared parameter once
        if not parameter.requires_grad:
            continue
        # a bias is told apart only where it has a rate of its own: each group costs a launch
        is_bias = name.endswith("bias") and config.bias_lr_factor != 1
        above = layers.get(id(parameter))
        # one number for each channel is no weight, however a map's places are kept in its shape
        is_weight = parameter.ndim > 1 and parameter.shape[1:].numel() > 1
        key = (above, is_weight, is_bias)
        lr = config.lr * (config.bias_lr_factor if is_bias else 1.0)
        if above is not None:
            lr *= config.encoder_lr_factor * config.layer_decay**above
        decay = config.weight_decay if is_weight else 0.0
        # base_lr stays; lr is written from it at each step, so that no rounding adds up
        group = groups.setdefault(
            key, {"params": [], "lr": lr, "base_lr": lr, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layers_above(network: nn.Module, layer_decay: float) -> dict[int, int]:
    """The layers between each parameter of the encoder and the head, by the parameter's id; 0 where
    all have one rate.
    """
    encoder = getattr(network, "encoder", None)
    if layer_decay != 1 and not isinstance(encoder, Encoder):
        got = f"segmentor_optimizer.layer_decay={layer_decay} for a network that has no such layers"
        needed = "a segmentor on an encoder that numbers its layers, such as dpt_vitb14"
        raise InputError(got, needed, "write segmentor_optimizer.layer_decay=1")
    if encoder is None:
        return {}
    # by identity, as == of tensors compares their values
    return {
        id(parameter): encoder.layers_above(name) if layer_decay != 1 else 0
        for name, parameter in encoder.named_parameters()
    }


def build_optimizer(
    network: nn.Module, config: OptimizerConfig, own_shards: Mapping[Tensor, Tensor] | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD with its state made at once, so that a checkpoint has the same keys at every
    step.

    own_shards: what the optimizer shall work on in place of each parameter, such as this rank's
    shard of it.
    """
    groups = parameter_groups(network, config)
    if own_shards is not None:
        for group in groups:
            group["params"] = [own_shards[parameter] for parameter in group["params"]]
    # fused: a few launches for all tensors, and the kernels that obey found_inf (`guarded_step`)
    optimizer: torch.optim.Optimizer
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    else:
        optimizer = torch.optim.SGD(
            groups, momentum=config.beta1, nesterov=config.nesterov, fused=True
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].update(initial_state(parameter, config))
    return optimizer


def initial_state(parameter: Tensor, config: OptimizerConfig) -> dict[str, Tensor]:
    """What the optimizer remembers of a parameter before its first update, by kind ("exp_avg",
    ...).
    """

    def zeros() -> Tensor:  # in the parameter's own memory format, as the fused kernels need
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)

    if config.name == "sgd":
        # torch would begin with a copy of the gradient: the same, as there is no dampening
        return {"momentum_buffer": zeros()}
    # on the device, where the fused kernels count
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}


def clip(
    parameters: list[Tensor],
    clip_norm: float,
    over_ranks: Callable[[Tensor], Tensor] = lambda norm: norm,
) -> Tensor:
    """The gradients' total norm before clipping (scalar); scales them to `clip_norm` at most when
    that is > 0.

    over_ranks: from the norm of these gradients to that of all, where other ranks hold the rest.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # in two halves, as clip_grad_norm_ would clip each rank's shards by their own norm
    norm = over_ranks(nn.utils.get_total_norm(gradients))
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def guarded_step(optimizer: torch.optim.Optimizer, norm: Tensor) -> Tensor:
    """Step unless the gradient norm is not finite; decided on the device, without a wait.

    Every rank holds the same averaged gradients, so all decide alike. Returns 1.0 when skipped,
    else 0.0.
    """
    skipped = (~norm.isfinite()).to(torch.float32)
    # the fused kernels read it and leave everything as it was, see torch.amp.GradScaler.step
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return skipped


class LossScale:
    """The factor that keeps one network's fp16 gradients above the smallest number; one for each
    network.

    Halved when a gradient is not finite, doubled after `INTERVAL` updates in a row that were
    (Micikevicius et al. 2018, section 3.2; the numbers are torch.amp.GradScaler's), up to `MAX`:
    gradients that stay at zero would double it until it is infinite. Everything stays on the
    device, without a wait.

    Not torch.amp.GradScaler itself, one for each network, which was measured in torch 2.13.0 (100
    convolutions, one CPU thread, medians of 40 alternating steps): with fused optimizers it does
    not wait for the device either, and takes as long (SGD 174 ms against 164, AdamW 344 against
    355, within the noise). But it decides by the gradients that this rank holds, and takes no
    decision from outside: under FSDP the ranks would skip different updates. `guarded_step` skips
    without fp16 too, by the norm over all ranks, so there would be two decisions. And its
    state_dict() waits for the device twice, where a checkpoint wants tensors.
    """

    START, INTERVAL, MAX = 2.0**16, 2000, 2.0**24

    def __init__(self, device: torch.device):
        self.scale = torch.full((), self.START, device=device)
        self._good_updates = torch.zeros((), device=device)

    def unscale(self, parameters: list[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # what has overflowed stays infinite, and the norm shows it
        torch._foreach_mul_(gradients, 1.0 / self.scale)

    def update(self, skipped: Tensor) -> None:
        """Take in whether the update was skipped (1.0) or made (0.0)."""
        # factors of 0 and 1 in place of branches, for which the device would be waited for
        self._good_updates.add_(1).mul_(1 - skipped)
        due = (self._good_updates >= self.INTERVAL).to(torch.float32)
        # not cut off at it: one that a checkpoint holds above comes down by halving alone
        doubled = due * (self.scale < self.MAX)
        self.scale.mul_((1 - 0.5 * skipped) * (1 + doubled))
        self._good_updates.mul_(1 - due)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; the tensors themselves."""
        return {"loss_scale": self.scale, "good_updates": self._good_updates}
