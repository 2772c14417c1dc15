"""What is read out of a run's metrics to judge it by: one number a row, and who it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distseg.config.forms import DEFAULT, FORMS
from distseg.config.schema import ADAPTATION, WITH_UNLABELLED
from distseg.tracking.catalogue import (
    ADVERSARIAL_WEIGHT,
    AGREEMENT,
    CLASS_SHARE,
    CONFIDENT_AGREEMENT,
    CONFIDENT_SHARE,
    CONSISTENCY_WEIGHT,
    COPY_FAILURES,
    CROSS_ENTROPY,
    DATA_WAIT_SECONDS,
    DISCRIMINATOR_ACCURACY,
    DISCRIMINATOR_FAKE,
    DISCRIMINATOR_REAL,
    EXCESS,
    HELD_OUT_CONFIDENT,
    LABELLED_SHARE,
    LOSS,
    MASK_SHARE,
    MEAN_IOU,
    NEVER_PREDICTED,
    RATIO,
    SEGMENTOR_LOSS,
    SLOWEST_RANK,
    SLOWEST_RATIO,
    SOURCE_ENTROPY,
    SOURCE_SHARE,
    STEP_SECONDS,
    TARGET_ENTROPY,
    TARGET_SHARE,
)

MetricsRow = dict[str, Any]  # of metrics.jsonl: "step" and named floats
Unpredicted = dict[str, tuple[int, int]]
Unkept = dict[str, tuple[int, int, float]]
# since which step each is missing, and its share of what is told, the most frequent first
Classes = dict[str, tuple[int, float]]

# of these, as every network that explodes shows in them, and as they begin at their highest: others
# may begin with few pixels, or with a weight that is yet to come
LEVELLED = (CROSS_ENTROPY, SEGMENTOR_LOSS, DISCRIMINATOR_REAL, DISCRIMINATOR_FAKE)
# in the row before, by distseg.tracking.health: the level that a loss began at, and the highest
# that it may have begun at
LEVEL, HIGHEST_LEVEL = "level/", "level"
UNDECIDED = "level of an undecided discriminator"  # likewise: its loss on either kind of map
OF_DOMAINS = "discriminator of domains"  # likewise: whether it tells domains apart
NO_TARGET = "no target"  # likewise: whether no image of a target is trained on
CHOOSES = "teacher chooses"  # likewise: whether pixels must be confident to be taught
LEVEL_ROWS = 5  # whose median is the level
MEAN_LEVEL = 100.0  # of means over pixels: ln 255 = 5.5 nats, and room for the weights of terms
SUM_LEVEL = 1e6  # of sums over an image's pixels, 4 nats at each of 512 x 512
# in the row before, by distseg.tracking.health: of each class that no prediction has, the step of
# the first evaluation that says so, and how many in a row do
UNPREDICTED = "unpredicted"
# the rarest classes come late: in the first evaluations they are missing in good runs, too
MIN_EVALUATIONS, MIN_UNPREDICTED_STEPS = 3, 200
MAX_NAMED = 5
# likewise: of each class that confident pseudo-labels lack, see `unkept`; and the teacher's best
# agreement with the labels of held-out images
UNKEPT, BEST_AGREEMENT = "unkept", "best agreement"
LOST = "lost"  # likewise: of each class that predictions for the target lack, see `lost`
# of the confident pixels of a step: 0.01 % of 8 crops of 240 x 240 are 46 pixels, of an object's
# edge. A class that labels show fifty times as much is missing, not rare.
UNKEPT_BELOW, MIN_LABELLED_SHARE = 1e-4, 5e-3
MIN_UNKEPT_ROWS, MIN_UNKEPT_STEPS = 10, 200
MIN_CONFIDENT = 0.05  # of the unlabelled pixels; of fewer, teacher_is_unsure tells soon enough
DOMINANT_LABEL = 0.6  # of two classes one may well have most pixels, of the labels too
NEARLY_ALL = 0.9  # of the pixels
# of a discriminator's accuracy: as good as chance, and as good as always right
BLIND_WITHIN, SATURATED_FROM = 0.05, 0.99


def levels_of(config: Mapping[str, Any]) -> MetricsRow:
    """What `Health` starts from: a run's levels, by its configuration under dotted names."""
    is_mean = config.get("loss.ce_reduction"), config.get("loss.adv_reduction")
    form = FORMS.get(str(config.get("loss.adv_form")), FORMS[DEFAULT])
    return {
        HIGHEST_LEVEL: MEAN_LEVEL if is_mean == ("mean_valid", "mean") else SUM_LEVEL,
        UNDECIDED: form.undecided,
        OF_DOMAINS: config.get("mode") in ADAPTATION,
        NO_TARGET: "mode" in config and not _has_target(config),
        CHOOSES: config.get("consistency.threshold") != 0,
    }


def _has_target(config: Mapping[str, Any]) -> bool:
    """Whether unlabelled images may be of another domain, which is validated on."""
    mode, others = config["mode"], config.get("data.unlabelled_shards", True)
    return mode in ADAPTATION or (mode in WITH_UNLABELLED and bool(others))


def fake_loss(row: MetricsRow, before: MetricsRow) -> float | None:
    # between domains what it has won at is another thing
    return None if before.get(OF_DOMAINS) else _loss_when_right(row, before)


def target_loss(row: MetricsRow, before: MetricsRow) -> float | None:
    return _loss_when_right(row, before) if before.get(OF_DOMAINS) else None


def _loss_when_right(row: MetricsRow, before: MetricsRow) -> float | None:
    """The discriminator's loss on what is fake to it, where it is right about nearly all label
    maps.

    Else as if undecided.
    """
    if DISCRIMINATOR_FAKE not in row or DISCRIMINATOR_ACCURACY not in row:
        return None
    # A small loss alone is no proof: it may be small since everything is called fake.
    if row[DISCRIMINATOR_ACCURACY] < 0.9:
        return math.log(2)
    return row[DISCRIMINATOR_FAKE] * _as_bce(before)


def both_losses(row: MetricsRow, before: MetricsRow) -> float | None:
    if DISCRIMINATOR_FAKE not in row or DISCRIMINATOR_ACCURACY not in row:
        return None
    # between domains it is the aim that the discriminator sees no difference any more
    if before.get(OF_DOMAINS):
        return None
    # the mean of both, as ln 2 is the level of each when it answers 1/2 to everything
    return (row[DISCRIMINATOR_REAL] + row[DISCRIMINATOR_FAKE]) / 2 * _as_bce(before)


def _as_bce(before: MetricsRow) -> float:
    """What brings a loss of another form to the scale of the thresholds: ln 2 where undecided."""
    return math.log(2) / float(before.get(UNDECIDED, math.log(2)))


def influence(row: MetricsRow, before: MetricsRow) -> float | None:
    # at weight 0 the term is only watched, by intention
    return row.get(RATIO) if row.get(ADVERSARIAL_WEIGHT, 0) > 0 else None


def mask_share(row: MetricsRow, before: MetricsRow) -> float | None:
    return row.get(MASK_SHARE)


def confident(row: MetricsRow, before: MetricsRow) -> float | None:
    # before its start the term is not meant to do anything
    return row.get(CONFIDENT_SHARE) if row.get(CONSISTENCY_WEIGHT, 0) > 0 else None


def not_finite(row: MetricsRow, before: MetricsRow) -> float | None:
    """1 for a loss that is not finite, or the share of steps since the row before whose update was
    skipped.

    Without a loss scale, which finds its size by skipping now and then, one skipped update is as
    bad.
    """
    # a row of an evaluation says nothing of gradients
    losses = [value for name, value in row.items() if name.startswith(LOSS)]
    if not losses:
        return None
    if not all(math.isfinite(value) for value in losses):
        return 1.0
    worst = 0.0
    for name in ("segmentor", "discriminator"):
        skipped = row.get(f"skips/{name}", 0.0) - before.get(f"skips/{name}", 0.0)
        # since the row before: counts grow over the run, and rows may be any number of steps apart
        steps = max(1, row["step"] - before.get("step", 0))
        # fp16's scale doubles until a step overflows, so that some skips belong to it
        worst = max(worst, skipped / steps if f"loss_scale/{name}" in row else float(skipped > 0))
    return worst


def growth(row: MetricsRow, before: MetricsRow) -> float | None:
    """The power of ten by which a loss is above the level that it began at; the largest one."""
    highest = float(before.get(HIGHEST_LEVEL, SUM_LEVEL))
    powers: list[float] = []
    for name in LEVELLED:
        value = float(row.get(name, math.nan))
        if math.isfinite(value):
            # from 1 nat on, since a loss that began near 0 may well become 100 times as large; and
            # up to what an untrained network can have, since a run may explode before its first row
            level = min(max(1.0, float(before.get(LEVEL + name, highest))), highest)
            powers.append(math.log10(max(value, 1.0) / level))
    return max(powers) if powers else None


def unpredicted(row: MetricsRow, before: Unpredicted) -> Unpredicted:
    """The classes that an evaluation's predictions lack, by their metrics' names."""
    found = {}
    for name in row:
        if name.startswith(NEVER_PREDICTED):
            first, times = before.get(name, (row["step"], 0))
            found[name] = (first, times + 1)
    return found


def _given_up(row: MetricsRow, before: MetricsRow) -> Classes:
    """Those that were lacking for long, and their share of the labels."""
    found = {}
    for name, (first, times) in before.get(UNPREDICTED, {}).items():
        if times >= MIN_EVALUATIONS and row["step"] - first >= MIN_UNPREDICTED_STEPS:
            found[name.removeprefix(NEVER_PREDICTED)] = (first, row.get(name, 0.0))
    return _by_share(found)


def num_given_up(row: MetricsRow, before: MetricsRow) -> float | None:
    # of evaluations alone: a batch of some crops lacks classes by chance
    return float(len(_given_up(row, before))) if MEAN_IOU in row else None


def who_is_given_up(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    return _named(_given_up(row, before), "labels")


def _by_share(found: Classes) -> Classes:
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _named(found: Classes, whole: str) -> tuple[str, int | None]:
    """The classes and their shares of the `whole`, and the first step that one was missing at."""
    named = [f"{name} {share:.2%}" for name, (_, share) in found.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    since = min((first for first, _ in found.values()), default=None)
    return f"{', '.join(named[:MAX_NAMED])} of the {whole}{more}", since


def unkept(row: MetricsRow, before: Unkept) -> Unkept:
    """The classes that confident pseudo-labels lack, by their metrics' names: since which row, in
    how many, and the sum of their shares of the labelled pixels in these.
    """
    found = {}
    for name in row:
        # one row in which it is kept begins the count anew
        if name.startswith(CLASS_SHARE) and row[name] < UNKEPT_BELOW:
            first, rows, total = before.get(name, (row["step"], 0, 0.0))
            total += row.get(LABELLED_SHARE + name.removeprefix(CLASS_SHARE), 0.0)
            found[name] = (first, rows + 1, total)
    return found


def lost(row: MetricsRow, before: Unkept) -> Unkept:
    """The classes that predictions for the target lack and those for the source have, as `unkept`
    has them: since which evaluation, in how many, and the sum of their shares for the source.
    """
    found = {}
    for name in row:
        word = name.removeprefix(SOURCE_SHARE)
        is_missing = row.get(TARGET_SHARE + word, 1.0) < UNKEPT_BELOW
        if name.startswith(SOURCE_SHARE) and is_missing and row[name] >= MIN_LABELLED_SHARE:
            first, times, total = before.get(word, (row["step"], 0, 0.0))
            found[word] = (first, times + 1, total + row[name])
    return found


def _lost_for_long(row: MetricsRow, before: MetricsRow) -> Classes:
    """Those that were missing for long, the most frequent first: since which step, and their mean
    share for the source.
    """
    found = {}
    for name, (first, times, total) in before.get(LOST, {}).items():
        if times >= MIN_EVALUATIONS and row["step"] - first >= MIN_UNPREDICTED_STEPS:
            found[name] = (first, total / times)
    return _by_share(found)


def num_lost(row: MetricsRow, before: MetricsRow) -> float | None:
    # by the row itself, as runs on one data set and earlier versions have no such shares
    is_of_domains = any(name.startswith(SOURCE_SHARE) for name in row)
    # what a run on the source alone does not find in other data, no adaptation has pushed out
    is_of_domains &= not before.get(NO_TARGET)
    return float(len(_lost_for_long(row, before))) if is_of_domains else None


def who_is_lost(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    return _named(_lost_for_long(row, before), "predictions for the source")


def relative_entropy(row: MetricsRow, before: MetricsRow) -> float | None:
    """The target's entropy over the source's, where no discriminator teaches anything; else 1."""
    if TARGET_ENTROPY not in row:
        return None
    # of MinEnt and self-training there is none
    accuracy = row.get(DISCRIMINATOR_ACCURACY, 0.5)
    # one that sees a difference pulls the target back to what the source looks like
    if abs(accuracy - 0.5) > BLIND_WITHIN and accuracy < SATURATED_FROM:
        return 1.0
    # a ratio: how sure a network is at all depends on its classes, data and steps
    return row[TARGET_ENTROPY] / max(row[SOURCE_ENTROPY], 1e-9)


def teaches(row: MetricsRow) -> bool:
    """Whether the teacher is confident of enough pixels to teach by, and to miss a class among."""
    return (confident(row, {}) or 0.0) >= MIN_CONFIDENT


def _left_out(row: MetricsRow, before: MetricsRow) -> Classes:
    """Classes that were lacking for long though labels show them, the most frequent first: since
    which step, and their share of the labelled pixels.
    """
    found = {}
    for name, (first, rows, total) in before.get(UNKEPT, {}).items():
        # both, as rows may be 1 or 1,000 steps apart
        is_long = rows >= MIN_UNKEPT_ROWS and row["step"] - first >= MIN_UNKEPT_STEPS
        if is_long and total / rows >= MIN_LABELLED_SHARE:
            found[name.removeprefix(CLASS_SHARE)] = (first, total / rows)
    return _by_share(found)


def num_left_out(row: MetricsRow, before: MetricsRow) -> float | None:
    return float(len(_left_out(row, before))) if teaches(row) else None


def who_is_left_out(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    return _named(_left_out(row, before), "labelled pixels")


def _dominant(row: MetricsRow) -> tuple[str, float]:
    """The class with the largest share of the confident pixels, of those that do not dominate the
    labels too; and that share.
    """
    # so that there is a largest one where labels are of one class alone
    shares = {"": 0.0}
    for name in row:
        word = name.removeprefix(CLASS_SHARE)
        if name.startswith(CLASS_SHARE) and row.get(LABELLED_SHARE + word, 0.0) < DOMINANT_LABEL:
            shares[word] = row[name]
    return max(shares.items(), key=lambda item: item[1])


def dominance(row: MetricsRow, before: MetricsRow) -> float | None:
    return _dominant(row)[1] if teaches(row) else None


def who_dominates(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    name, share = _dominant(row)
    labelled = row.get(LABELLED_SHARE + name, 0.0)
    return f"{name}: {share:.1%} of the confident pixels, {labelled:.1%} of the labelled", None


def wrong_though_sure(row: MetricsRow, before: MetricsRow) -> float | None:
    """The share of wrong pixels among confident ones, where nearly all are; else 0."""
    # as of `fallen`; and at threshold 0 all are confident whatever the teacher says
    if CONFIDENT_AGREEMENT not in row or not teaches(before) or not before.get(CHOOSES, True):
        return None
    # a threshold that few pixels reach still chooses: wrong ones are then another check's matter
    is_sure = row[HELD_OUT_CONFIDENT] >= NEARLY_ALL
    return 1.0 - row[CONFIDENT_AGREEMENT] if is_sure else 0.0


def fallen(row: MetricsRow, before: MetricsRow) -> float | None:
    """How far the teacher's agreement with held-out labels is below its best so far."""
    # while it teaches: an average of untrained weights is not its own doing
    if AGREEMENT not in row or not teaches(before):
        return None
    # of all pixels: among the confident ones it falls as more, and so harder ones, are confident
    return max(0.0, float(before.get(BEST_AGREEMENT, 0.0)) - row[AGREEMENT])


def wait_share(row: MetricsRow, before: MetricsRow) -> float | None:
    if DATA_WAIT_SECONDS not in row or not row.get(STEP_SECONDS):
        return None
    return row[DATA_WAIT_SECONDS] / row[STEP_SECONDS]


def who_is_slow(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    # of the section in which it loses most; rows of earlier versions have none
    beyond = {name: seconds for name, seconds in row.items() if name.startswith(EXCESS)}
    most = max(beyond, key=lambda name: beyond[name], default="")
    where = f", in {most.removeprefix(EXCESS)}" if most else ""
    return f"rank {row[SLOWEST_RANK]:.0f}{where}", None


def slowest(row: MetricsRow, before: MetricsRow) -> float | None:
    """How much slower the slowest rank is; 1 where it is another one than in the row before."""
    if SLOWEST_RANK not in row:
        return None
    # some rank always is the slowest; only the same one again and again is a slow machine
    return row[SLOWEST_RATIO] if row[SLOWEST_RANK] == before.get(SLOWEST_RANK) else 1.0


def copy_failures(row: MetricsRow, before: MetricsRow) -> float | None:
    return row.get(COPY_FAILURES)
