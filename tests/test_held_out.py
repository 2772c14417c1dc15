"""Labelled images that no step sees, and what they say of pseudo-labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distseg
from distseg.config import loading
from distseg.data.plan import Plan
from distseg.data.samples import SampleSet, hold_out, split_labelled
from distseg.distributed.ranks import Ranks
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.losses.predicted import PseudoLabels
from distseg.train import diagnostics
from distseg.train.held_out import HeldOut
from distseg.train.inputs import open_data
from distseg.train.strong_views import StrongViews
from distseg.train.teacher import Alignment, WeakToStrong, logit_adjustment
from shards.errors import InputError
from shards.reader import ShardReader
from shards.sample import STANFORD
from tests.ranks import leave_out, run_ranks
from tests.tiny import SETTINGS

THRESHOLD = 0.7
WEIGHT = ["consistency.weight=1"]
PIXELS = np.arange(1, 9)[None] ** 2  # of each class, labelled
SHIFT = torch.linspace(-0.3, 0.5, 8, dtype=torch.float64)  # of logits, learned before


def test_the_last_of_the_draw_are_held_out_also_by_the_list_of_a_run_that_goes_on(
    toy_shards: Path, tmp_path: Path
) -> None:
    reader = ShardReader(toy_shards, "train")
    order = Plan(8, 5)
    drawn = [order.sample_index(place) for place in range(6)]
    labelled, _ = split_labelled(reader, "3/4", 5)
    assert hold_out(reader, labelled, 2, 5) == (sorted(drawn[:4]), sorted(drawn[4:]))
    assert hold_out(reader, labelled, 1, 5)[1] == [drawn[5]]
    listed = tmp_path / "labelled.txt"
    listed.write_text("\n".join(reader.key(index) for index in drawn))
    again, _ = split_labelled(reader, str(listed), 5)
    assert hold_out(reader, again, 2, 5) == hold_out(reader, labelled, 2, 5)
    with pytest.raises(InputError, match="held_out=6 of 6 labelled samples"):
        hold_out(reader, labelled, 6, 5)


def test_no_step_reads_what_is_held_out(toy_shards: Path, tmp_path: Path) -> None:
    common = [f"data.shards={toy_shards}", "mode=consistency", "consistency.weight=1"]
    common += ["data.labelled=1/2", "ema_decay=0.9", "batch_size=2", f"run_dir={tmp_path}"]
    every = open_data(loading.load(common), 1)
    data = open_data(loading.load([*common, "consistency.held_out=1"]), 1)
    assert every.held_out is None and data.held_out is not None and data.unlabelled is not None
    assert sorted([*data.train.keys, *data.held_out.keys]) == every.train.keys
    assert every.unlabelled is not None and data.unlabelled.keys == every.unlabelled.keys
    with pytest.raises(InputError, match="to train on"):
        open_data(loading.load([*common, "consistency.held_out=4"]), 1)
    # without a teacher nothing is held out
    supervised = [word for word in common if not word.startswith("consistency")]
    config = loading.load([*supervised, "mode=supervised", "consistency.held_out=1"])
    assert open_data(config, 1).train.keys == every.train.keys


class Colours(nn.Module):
    """The class whose colour is the nearest to that of a darker image: sometimes a wrong one."""

    def forward(self, image: Tensor) -> Tensor:
        palette = torch.tensor(STANFORD.palette, dtype=image.dtype) / 255
        distance = (0.6 * image[:, None] - palette[:, :, None, None]).square().sum(2)
        return -12 * distance


def compared(ranks: Ranks, shards: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Of the toy's training images; and the shares of classes of a batch of which each rank holds
    other pixels.
    """
    samples = SampleSet(ShardReader(Path(shards), "train"))
    network, told = Colours().train(), []
    look = TestTimeAugmentation((1.0,), False, "fp32", ranks.device)
    # as training corrects what it says: by the labels, and by what was said so far
    alignment = Alignment(1.0, PIXELS, ranks)
    alignment.load_state_dict({"alignment": {"share": SHIFT, "shift": SHIFT}})
    adjustment = logit_adjustment(0.4, PIXELS)
    config = loading.load([*WEIGHT, "data.shards=unused", "mode=consistency", "ema_decay=0.9"])
    views = StrongViews.of_unlabelled(config, 8, ranks)
    taught = WeakToStrong(network, views, adjustment=adjustment, alignment=alignment)
    looks = (samples, ranks, look)
    held_out = HeldOut(lambda: network, taught.corrected, *looks, THRESHOLD, 0, told.append)
    found = held_out()
    assert network.training and len(told) == len(range(ranks.rank, 8, ranks.world_size))
    share = slice(ranks.rank * 6 // ranks.world_size, (ranks.rank + 1) * 6 // ranks.world_size)
    label, pseudo = batch()
    part = PseudoLabels(pseudo.label[share], pseudo.confidence[share])
    shares = diagnostics.class_shares(label[share], part, 0.5, STANFORD.names)
    return found, {name: float(value) for name, value in shares.items()}


def batch() -> tuple[Tensor, PseudoLabels]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (6, 9, 7), generator=generator).to(torch.uint8)
    label[1], label[2, :4] = 255, 7
    pseudo = torch.randint(0, 8, (6, 9, 7), generator=generator).to(torch.uint8)
    pseudo[4:, 3:] = 255
    confidence = torch.rand(6, 9, 7, generator=generator)
    confidence[0] = -1  # closed by the gate
    return label, PseudoLabels(pseudo, confidence)


def test_shares_are_those_of_all_pixels_together_on_any_number_of_ranks(toy_shards: Path) -> None:
    results = [*run_ranks(1, compared, str(toy_shards)), *run_ranks(3, compared, str(toy_shards))]
    expected = by_pixel(toy_shards)
    assert 0.2 < expected["held_out/confident_share"] < 0.95
    assert expected["held_out/confident_agreement"] > expected["held_out/agreement"]
    label, pseudo = batch()
    sure = pseudo.label[(pseudo.confidence >= 0.5) & (pseudo.label != 255)]
    for found, shares in results:
        assert found == results[0][0]
        # in fp32 a pixel between two classes may fall to the other one: one of 36,000
        assert found == pytest.approx(expected, abs=5e-5)
        for index, name in enumerate(STANFORD.names):
            kept, labelled = (sure == index).double().mean(), label[label != 255] == index
            assert shares[f"consistency/class_share/{name}"] == pytest.approx(
                float(kept), abs=1e-15
            )
            of_labels = shares[f"consistency/labelled_share/{name}"]
            assert of_labels == pytest.approx(float(labelled.double().mean()), abs=1e-15)


def test_a_run_judges_the_labels_that_it_trains_on(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch.setattr)
    # an adjustment after which all of them are of one class
    grass = STANFORD.names.index("grass")
    adjustment = 1e4 * nn.functional.one_hot(torch.tensor(grass), 8)[:, None, None].double()
    monkeypatch.setattr("distseg.train.assembly.logit_adjustment", lambda *_: adjustment)
    data = SETTINGS["data"] | {"shards": str(toy_shards), "labelled": "1/2"}
    teacher = {"weight": 1.0, "held_out": 2, "logit_adjustment": 1.0, "threshold": 0.99}
    keys = SETTINGS | {"mode": "consistency", "data": data, "consistency": teacher, "steps": 1}
    del keys["discriminator"]
    distseg.fit(**keys, run_dir=str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = next(row for row in rows if "held_out/agreement" in row)
    assert found["held_out/confident_share"] == found["held_out/confident_agreement/grass"] == 1
    assert found["held_out/confident_agreement/sky"] == 0


def by_pixel(shards: Path) -> dict[str, float]:
    """In NumPy, over one row of all pixels of the toy's training images."""
    samples = SampleSet(ShardReader(shards, "train"))
    columns = []
    for index in range(len(samples)):
        _, image, label = samples.load(index)
        distance = (0.6 * image[:, :, None].astype(np.float64) - np.array(STANFORD.palette)) / 255
        raised = SHIFT.numpy() - 0.4 * np.log(PIXELS[0] / PIXELS.sum())
        chances = np.exp(-12 * np.square(distance).sum(-1) + raised)
        chances /= chances.sum(-1, keepdims=True)
        columns.append([label.ravel(), chances.argmax(-1).ravel(), chances.max(-1).ravel()])
    label, predicted, chance = (np.concatenate(each) for each in zip(*columns, strict=True))
    valid = label != 255
    label, right = label[valid], (label == predicted)[valid]
    sure = chance[valid] >= THRESHOLD
    found = {"held_out/agreement": right.mean(), "held_out/confident_share": sure.mean()}
    found["held_out/confident_agreement"] = right[sure].mean()
    for index, name in enumerate(STANFORD.names):
        found[f"held_out/confident_share/{name}"] = sure[label == index].mean()
        if sure[label == index].any():
            agreement = right[sure & (label == index)].mean()
            found[f"held_out/confident_agreement/{name}"] = agreement
    return {name: float(value) for name, value in found.items()}
