"""The example of a loss term of one's own, against its formula, and in whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from distseg.config import loading
from distseg.config.schema import TermConfig
from distseg.models import build_discriminator, build_segmentor
from distseg.train.objective import build_objective, build_term, check_terms
from shards import user_code
from shards.errors import InputError
from tests.test_train import checkpoint_bytes, curve, finish, start

FOCAL = f"{Path(__file__).parent.parent}/examples/own_loss.py:focal"


def test_it_is_the_papers_formula_and_void_counts_nothing() -> None:
    focal = user_code.load(FOCAL, "loss.terms.focal").value
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 4, 6, 5), generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    label = torch.randint(0, 4, (2, 6, 5), generator=generator).to(torch.uint8)
    label[0, :2] = 255
    total, count = focal(logits, label, gamma=2.0)
    expected = torch.zeros((), dtype=torch.float64)
    for n, y, x in (label != 255).nonzero().tolist():
        p = logits[n, :, y, x].exp()[label[n, y, x].long()] / logits[n, :, y, x].exp().sum()
        expected = expected - (1 - p) ** 2 * p.log()
    assert int(count) == 60 - 10 and total.item() == pytest.approx(expected.item(), rel=1e-12)
    found, by_hand = (torch.autograd.grad(it, logits)[0] for it in (total, expected))
    assert torch.allclose(found, by_hand, atol=1e-12)
    plain = F.cross_entropy(logits, label.long(), ignore_index=255, reduction="sum")
    assert focal(logits, label, gamma=0)[0].item() == pytest.approx(plain.item(), rel=1e-12)


def test_a_run_goes_on_to_the_same_bits(toy_shards: Path, tmp_path: Path) -> None:
    term = [f"loss.terms.focal.use={FOCAL}", "loss.terms.focal.weight=0.5"]
    term += ["loss.terms.focal.options.gamma=1"]
    finish(start(2, toy_shards, tmp_path / "whole", *term))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000012")
    assert "resumed at step" in finish(start(2, toy_shards, tmp_path / "killed", *term))
    assert checkpoint_bytes(tmp_path / "killed") == checkpoint_bytes(tmp_path / "whole")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert all(
        "loss/focal" in losses
        for _, losses in curve(tmp_path / "whole")
        if "loss/segmentor" in losses
    )


CLASS = """
import torch
from distseg.losses import Predicted, Targets, Term


class Entropy(Term):
    images = "unlabelled"

    def __init__(self, power=1.0):
        self.power = power

    def count(self, targets: Targets):
        return targets.valid.sum().double()

    def local_sum(self, seen: Predicted):
        log_p = seen.logits.float().log_softmax(1)
        return (-(log_p.exp() * log_p).sum(1) ** self.power * seen.targets.valid).sum()


class NoTerm:
    pass
"""


def test_a_class_of_ones_own_is_a_term_on_unlabelled_images(tmp_path: Path) -> None:
    (tmp_path / "entropy.py").write_text(CLASS)
    path = f"{tmp_path}/entropy.py"
    term = build_term("mine", TermConfig(f"{path}:Entropy", options={"power": 2.0}))
    assert (term.name, term.images) == ("mine", "unlabelled")
    check_terms([term], 4)
    with pytest.raises(InputError, match=r"loss\.terms\.mine\.options[\s\S]*pwoer"):
        build_term("mine", TermConfig(f"{path}:Entropy", options={"pwoer": 2.0}))
    with pytest.raises(InputError, match=r"derives from distseg\.losses\.Term"):
        build_term("mine", TermConfig(f"{path}:NoTerm"))


OWN = """
import sys
import torch
from distseg.losses import Term


def mean_alone(logits, label):
    return logits.mean()


def leaves(logits, label):
    sys.exit(0)


class Hinge(Term):
    through_discriminator = True

    def count(self, targets):
        return torch.tensor(len(targets.label), dtype=torch.float64)

    def local_sum(self, seen):
        if seen.scores.shape[-1] != self.side:
            raise ValueError(f"scores of {tuple(seen.scores.shape)}")
        return seen.scores.relu().sum() + seen.scores.sum()


class PerImage(Hinge):
    side = 1


class PerCell(Hinge):
    side = 2  # of the two-branch network's, where label maps have 8
"""


def test_what_an_own_term_gets_wrong_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    for name, message in (
        ("mean_alone", "loss.terms.mine: the function returned a Tensor"),
        ("leaves", "loss.terms.mine: SystemExit: 0"),
    ):
        with pytest.raises(InputError) as found:
            check_terms([build_term("mine", TermConfig(f"{tmp_path}/own.py:{name}"))], 4)
        text = str(found.value)
        assert text.startswith(message) and text.count("needed:") == text.count("to do:") == 1


@pytest.mark.parametrize(("head", "own"), [("gap", "PerImage"), ("patch", "PerCell")])
def test_own_terms_are_tried_with_scores_as_the_discriminator_gives_them(
    head: str, own: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    other = {"PerImage": "PerCell", "PerCell": "PerImage"}[own]
    config = loading.load(
        [
            *("data.shards=unused", "mode=adversarial", "data.crop_px=64"),
            *("segmentor=multiscale", "segmentor.init=random", "discriminator=two_branch"),
            *(f"discriminator.options.head={head}", "discriminator.options.width=0.25"),
        ]
    )
    segmentor = build_segmentor("multiscale", 4, init="random")
    judge = build_discriminator("two_branch", 4, head=head, width=0.25)
    samples = SimpleNamespace(classes=SimpleNamespace(num_classes=4, names=tuple("abcd")))
    for name, fits in ((own, True), (other, False)):
        config.loss.terms = {"mine": TermConfig(f"{tmp_path}/own.py:{name}", weight=1.0)}
        if fits:
            assert build_objective(config, segmentor, judge, samples).terms[1].name == "mine"
            continue
        with pytest.raises(InputError, match=r"loss.terms.mine: ValueError: scores of"):
            build_objective(config, segmentor, judge, samples)
