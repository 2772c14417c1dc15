"""Optimizers: groups without duplicates, and non-finite gradients that change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distseg.config.schema import OptimizerConfig
from distseg.parallel.optimizers import (
    LossScale,
    build_optimizer,
    clip,
    guarded_step,
    parameter_groups,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.tied = self.head  # listed under two names, one parameter


def test_groups_hold_every_parameter_once_with_its_rate_and_decay() -> None:
    net = Net()
    groups = parameter_groups(
        net, OptimizerConfig(lr=1.0, encoder_lr_factor=0.25, weight_decay=0.1)
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == 4
    assert found[id(net.encoder.weight)] == (0.25, 0.1)
    assert found[id(net.encoder.bias)] == (0.25, 0.0)
    assert found[id(net.head.weight)] == (1.0, 0.1)
    assert found[id(net.head.bias)] == (1.0, 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_equal_the_plain_optimizer_and_bad_gradients_change_nothing(
    name: str, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    mine, plain = (nn.Conv2d(3, 5, 3).double() for _ in range(2))
    plain.load_state_dict(mine.state_dict())
    mine.to(memory_format=layout)
    config = OptimizerConfig(name, lr=0.1, weight_decay=0.01, clip_norm=1.0)
    optimizer = build_optimizer(mine, config)
    kinds = {"adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)}
    kinds["sgd"] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False)
    groups = [
        {"params": [plain.weight], "weight_decay": 0.01},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    reference = kinds[name](groups)
    for step in range(5):
        gradients = [torch.randn_like(parameter) for parameter in plain.parameters()]
        for theirs, ours, gradient in zip(
            plain.parameters(), mine.parameters(), gradients, strict=True
        ):
            theirs.grad = gradient / max(
                1.0, float(sum((g**2).sum() for g in gradients)) ** 0.5 + 1e-6
            )
            ours.grad = (
                gradient.clone(memory_format=torch.preserve_format).to(memory_format=layout)
                if gradient.ndim == 4
                else gradient.clone()
            )
        if step == 2:  # the same step with one bad number is left out
            before = [
                p.detach().clone()
                for p in [*mine.parameters(), *optimizer.state[mine.weight].values()]
            ]
            kept = [p.grad.clone() for p in mine.parameters()]
            mine.weight.grad[0, 0, 0, 0] = float("nan")
            assert guarded_step(optimizer, clip(list(mine.parameters()), 1.0)) == 1.0
            after = [*mine.parameters(), *optimizer.state[mine.weight].values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for parameter, gradient in zip(mine.parameters(), kept, strict=True):
                parameter.grad = gradient
        assert guarded_step(optimizer, clip(list(mine.parameters()), 1.0)) == 0.0
        reference.step()
    for theirs, ours in zip(plain.parameters(), mine.parameters(), strict=True):
        assert (theirs - ours).abs().max() < 1e-12


def test_clip_returns_the_norm_before_and_leaves_the_bound_after() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip([parameter], 1.0) == 5.0
    assert parameter.grad.norm() == pytest.approx(1.0, abs=1e-5)
    parameter.grad = torch.tensor([3.0, 4.0])
    clip([parameter], 0.0)
    assert parameter.grad.norm() == 5.0


def test_the_loss_scale_follows_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "INTERVAL", 3)
    ours = LossScale(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", init_scale=LossScale.START, growth_interval=3)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for bad in (0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        theirs.scale(parameter.sum() * (float("inf") if bad else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        parameter.grad = torch.full((2,), 3.0) * ours.scale
        ours.unscale([parameter])
        assert torch.equal(parameter.grad, torch.full((2,), 3.0))
        ours.update(torch.tensor(float(bad)))
        assert float(ours.scale) == theirs.get_scale()
        parameter.grad = None


def test_a_loss_scale_never_becomes_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "INTERVAL", 1)
    scale, scales = LossScale(torch.device("cpu")), []
    for skipped in (*[0.0] * 200, 1.0, 0.0, 0.0):
        scale.update(torch.tensor(skipped))
        scales.append(float(scale.scale))
    # what is skipped is halved from there, and comes back
    assert scales[7:] == [*[2.0**24] * 193, 2.0**23, 2.0**24, 2.0**24]


def test_biases_have_a_rate_of_their_own() -> None:
    groups = parameter_groups(
        Net(), OptimizerConfig(lr=1.0, encoder_lr_factor=0.5, bias_lr_factor=2.0)
    )
    assert sorted(group["lr"] for group in groups) == [0.5, 1.0, 1.0, 2.0]
    assert [group["weight_decay"] for group in groups if group["params"][0].ndim == 1] == [0.0, 0.0]
