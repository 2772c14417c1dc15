"""Scores of a split over any number of ranks.

The same bits, equal to brute force and to other libraries' values.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distseg.data.samples import SampleSet
from distseg.distributed.ranks import Ranks
from distseg.evaluate.boundary import boundary_counts, compare_outlines
from distseg.evaluate.evaluator import Evaluator
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.evaluate.metrics import calibration_counts, calibration_error
from distseg.evaluate.tally import NUM_RESAMPLES, Tally, bootstrap
from shards.errors import InputError
from shards.reader import ShardReader
from tests.ranks import run_ranks

NUM_CLASSES = 6
# fewer than two a rank of five
SIZES = ((24, 40), (17, 65), (32, 32), (9, 11), (60, 41), (50, 33), (40, 24))


def images(num_classes: int = NUM_CLASSES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(probabilities, label) of mixed sizes.

    Some void, class 4 never true, class 3 neither true nor predicted.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (height, width) in enumerate(SIZES):
        present = torch.tensor(
            [c for c in range(num_classes) if c not in (3, 4)], dtype=torch.uint8
        )
        coarse = present[torch.randint(len(present), (3, 4), generator=generator)]
        label = coarse.repeat_interleave(-(-height // 3), 0).repeat_interleave(-(-width // 4), 1)[
            :height, :width
        ]
        logits = torch.randn(num_classes, height, width, generator=generator)
        logits += 2 * torch.nn.functional.one_hot(label.long(), num_classes).permute(2, 0, 1)
        logits[3:4] = -50
        label = label.clone()
        label[torch.rand(label.shape, generator=generator) < 0.1] = 255
        if number == 2:
            label.fill_(255)  # an image without a labelled pixel counts as one that was seen
        # by numpy: torch's softmax differs in last bits with the number of threads, which differs
        # between the ranks and this process
        chances = np.exp(logits.numpy() - logits.numpy().max(0))
        made.append((torch.from_numpy(chances / chances.sum(0)), label))
    return made


def tallied(ranks: Ranks, num_classes: int = NUM_CLASSES, details: bool = True) -> dict:
    tally = Tally(len(SIZES), num_classes, ranks.device, details)
    for index, (probabilities, label) in enumerate(images(num_classes)):
        if index % ranks.world_size == ranks.rank:
            tally.add(index, probabilities, label)
    tally.sum_over_ranks()
    names = tuple(f"class {c}" for c in range(num_classes))
    intervals = (
        {f"interval of {name}": pair for name, pair in tally.intervals().items()} if details else {}
    )
    confusion = tally.confusion.tolist()
    values = tally.scores().to_dict(names) | tally.others(names) | intervals
    return values | {"confusion": confusion, "num_images": tally.num_images}


@pytest.fixture(scope="module")
def alone() -> dict:
    return tallied(Ranks(0, 1, 0, torch.device("cpu")))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_bits(alone: dict, world_size: int) -> None:
    for found in run_ranks(world_size, tallied):
        assert repr(found) == repr(alone)  # NaN equals NaN here
    assert alone["num_images"] == len(SIZES)


def test_scores_equal_scikit_learn(alone: dict) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth = torch.cat([label[label != 255] for _, label in images()]).numpy()
    guess = torch.cat([chances.argmax(0)[label != 255] for chances, label in images()]).numpy()
    assert (
        alone["confusion"]
        == sklearn.confusion_matrix(truth, guess, labels=range(NUM_CLASSES)).tolist()
    )
    present = sorted(set(truth) | set(guess))
    assert present == [0, 1, 2, 4, 5]  # 4 only predicted, 3 absent
    assert alone["num_classes_counted"] == 5 and math.isnan(alone["iou/class 3"])
    expected = sklearn.jaccard_score(truth, guess, labels=present, average=None)
    assert [alone[f"iou/class {c}"] for c in present] == pytest.approx(expected.tolist(), abs=1e-12)
    assert alone["mean_iou"] == pytest.approx(expected.mean(), abs=1e-12)
    assert alone["pixel_accuracy"] == pytest.approx(sklearn.accuracy_score(truth, guess), abs=1e-12)
    assert alone["mean_class_accuracy"] == pytest.approx(
        sklearn.balanced_accuracy_score(truth, guess), abs=1e-12
    )
    weighted = sklearn.jaccard_score(truth, guess, average="weighted", zero_division=0)
    assert alone["frequency_weighted_iou"] == pytest.approx(weighted, abs=1e-12)
    chances = torch.cat(
        [c.flatten(1)[:, label.flatten() != 255] for c, label in images()], 1
    ).T.double()
    loss = sklearn.log_loss(
        truth, chances / chances.sum(1, keepdim=True), labels=range(NUM_CLASSES)
    )
    assert alone["loss"] == pytest.approx(loss, rel=1e-5)


def test_scores_equal_torchmetrics(alone: dict) -> None:
    # may not import without torchvision
    classification = pytest.importorskip("torchmetrics.classification")
    iou = classification.MulticlassJaccardIndex(NUM_CLASSES, average=None, ignore_index=255)
    error = classification.MulticlassCalibrationError(NUM_CLASSES, n_bins=15, ignore_index=255)
    for chances, label in images():
        iou.update(chances.argmax(0)[None], label[None].long())
        error.update(chances[None], label[None].long())
    expected = iou.compute().tolist()
    assert [alone[f"iou/class {c}"] for c in (0, 1, 2, 4, 5)] == pytest.approx(
        [expected[c] for c in (0, 1, 2, 4, 5)]
    )
    assert alone["calibration_error"] == pytest.approx(float(error.compute()), abs=1e-5)


def test_calibration_error_equals_its_formula(alone: dict) -> None:
    chances = torch.cat(
        [c.flatten(1)[:, label.flatten() != 255] for c, label in images()], 1
    ).double()
    truth = torch.cat([label[label != 255] for _, label in images()])
    confidence, guess = chances.max(0)
    error = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap = (guess == truth)[inside].double().mean() - confidence[inside].mean()
            error += float(abs(gap) * inside.sum()) / len(truth)
    assert alone["calibration_error"] == pytest.approx(error, abs=1e-12)
    sure = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])  # wrong half of the time, always certain
    assert calibration_error(calibration_counts(sure, torch.tensor([[0, 1]]))) == 0.5


def test_outlines_are_averaged_over_classes_then_images(alone: dict) -> None:
    per_image, trimap_hits, trimap_union = [], np.zeros(NUM_CLASSES), np.zeros(NUM_CLASSES)
    for chances, label in images():
        guess, truth = chances.argmax(0).to(torch.uint8).numpy(), label.numpy()
        found = compare_outlines(guess, truth)
        if found.num_classes:
            per_image.append(found.f1_sum / found.num_classes)
        for c in range(NUM_CLASSES):
            inside = found.trimap & (truth != 255)
            trimap_hits[c] += ((guess == c) & (truth == c) & inside).sum()
            trimap_union[c] += (((guess == c) | (truth == c)) & inside).sum()
    assert len(per_image) == len(SIZES) - 1
    assert alone["boundary_f1"] == pytest.approx(np.mean(per_image), abs=1e-12)
    assert alone["trimap_iou"] == pytest.approx(
        (trimap_hits[trimap_union > 0] / trimap_union[trimap_union > 0]).mean()
    )


def test_boundary_iou_is_a_quotient_of_sums_over_all_images(alone: dict) -> None:
    total = np.zeros((2, NUM_CLASSES))
    for chances, label in images():
        guess = chances.argmax(0).to(torch.uint8).numpy()
        total += boundary_counts(guess, label.numpy(), NUM_CLASSES)
    present = [c for c in range(NUM_CLASSES) if total[1, c]]
    assert present == [0, 1, 2, 4, 5] and math.isnan(alone["boundary_iou/class 3"])
    expected = [total[0, c] / total[1, c] for c in present]
    assert [alone[f"boundary_iou/class {c}"] for c in present] == pytest.approx(expected, abs=1e-12)
    assert alone["mean_boundary_iou"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert 0 < alone["mean_boundary_iou"] < alone["mean_iou"] < 1


def test_bootstrap_equals_drawing_images_one_by_one() -> None:
    """Same draws, scores from the drawn images' summed confusion matrices."""
    from distseg.evaluate.metrics import scores

    rng = np.random.default_rng(3)
    # classes absent from some images
    matrices = rng.integers(0, 50, (8, 4, 4)) * rng.integers(0, 2, (8, 4, 1))
    margins = np.stack([matrices.diagonal(axis1=1, axis2=2), matrices.sum(2), matrices.sum(1)], 1)
    found = bootstrap(margins)
    draws = np.random.default_rng(0)
    values = []
    for _ in range(NUM_RESAMPLES // 100):
        for times in draws.multinomial(8, np.full(8, 1 / 8), size=100):
            drawn = np.repeat(np.arange(8), times)
            values.append(
                scores(torch.from_numpy(matrices[drawn].sum(0))).to_dict(("a", "b", "c", "d"))
            )
    for name, (low, high) in found.items():
        expected = np.percentile([value[name] for value in values], (2.5, 97.5))
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-12), name
        assert low < high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside, trials = 0, 60
    for _ in range(trials):  # images of 100 pixels whose accuracy is uniform: 0.5 in truth
        right = rng.integers(0, 101, 80)
        margins = np.stack([right, np.full(80, 100), np.full(80, 100)], 1)[:, :, None]
        low, high = bootstrap(margins)["pixel_accuracy"]
        inside += low <= 0.5 <= high
    assert 0.85 <= inside / trials <= 1


def test_an_image_seen_twice_or_never_is_an_error() -> None:
    for seen in ((0, 0, 1), (0,)):
        tally = Tally(2, 2, torch.device("cpu"))
        for index in seen:
            tally.add(index, torch.full((2, 3, 3), 0.5), torch.zeros(3, 3, dtype=torch.uint8))
        with pytest.raises(RuntimeError, match=r"image (0 was 2|1 was 0) times"):
            tally.sum_over_ranks()


def test_without_details_only_the_cheap_scores_are_there() -> None:
    found = tallied(Ranks(0, 1, 0, torch.device("cpu")), details=False)
    assert "loss" in found and not {"boundary_f1", "calibration_error"} & found.keys()


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_network_in_its_mode(toy_shards: Path, training: bool) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Dropout(0.5)).train(training)
    modes = []
    network[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    reader, device = ShardReader(toy_shards, "val"), torch.device("cpu")
    evaluator = Evaluator(
        lambda: network,
        SampleSet(reader),
        Ranks(0, 1, 0, device),
        TestTimeAugmentation((1.0,), False, "fp32", device),
        num_threads=0,
    )
    evaluator()
    assert modes == [False] * len(reader) and len(reader) > 0
    assert all(layer.training == training for layer in network.modules())


def test_nothing_but_void_is_refused() -> None:
    tally = Tally(1, 2, torch.device("cpu"), details=True)
    tally.add(0, torch.full((2, 3, 3), 0.5), torch.full((3, 3), 255, dtype=torch.uint8))
    tally.sum_over_ranks()
    with pytest.raises(InputError, match="labelled pixel"):
        tally.scores()


def test_a_single_image_has_scores_and_no_intervals() -> None:
    tally = Tally(1, 2, torch.device("cpu"), details=True)
    tally.add(0, torch.full((2, 3, 3), 0.5), torch.zeros(3, 3, dtype=torch.uint8))
    tally.sum_over_ranks()
    assert tally.scores().pixel_accuracy == 1 and tally.intervals() == {}


def test_two_classes_also_get_their_best_f1() -> None:
    found = tallied(Ranks(0, 1, 0, torch.device("cpu")), num_classes=2)
    sklearn = pytest.importorskip("sklearn.metrics")
    chances = torch.cat([c[1][label != 255] for c, label in images(2)]).numpy()
    truth = torch.cat([label[label != 255] for _, label in images(2)]).numpy()
    best = max(sklearn.f1_score(truth, np.floor(chances * 255) >= k) for k in range(256))
    assert found["max_f1"] == pytest.approx(best, abs=1e-12)


def test_classes_without_a_prediction_have_their_share_of_the_labels() -> None:
    tally = Tally(1, 4, torch.device("cpu"))
    tally.confusion += torch.tensor([[5, 0, 1, 0], [2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]])
    assert tally.never_predicted() == {1: 0.2}
