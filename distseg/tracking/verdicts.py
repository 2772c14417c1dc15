"""What is looked for in a run's signals, when it is told, what it means and what to try.

Thresholds stand with their source. "Recorded" are 240 logged rows of six runs of
`preset=stanford_semi` (three seeds, with and without unlabelled images), which ended as well as
without an adversary, and of teachers two runs of `preset=stanford_consistency`, one of which
collapses; tests/data/health holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distseg.config.forms import DEFAULT, FORMS
from distseg.config.schema import ADAPTATION
from distseg.tracking.catalogue import (
    ADVERSARIAL_WEIGHT,
    AGREEMENT,
    CLASS_SHARE,
    CONFIDENT_AGREEMENT,
    CONFIDENT_SHARE,
    CONSISTENCY_WEIGHT,
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
    STEP_SECONDS,
)

MetricsRow = dict[str, Any]  # of metrics.jsonl: "step" and named floats
Unpredicted = dict[str, tuple[int, int]]
Unkept = dict[str, tuple[int, int, float]]


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong.

    measure: its signal in a row, given the training row before (empty at first), or None where the
    row does not say. raise_at: raised when the signal's mean over the last rows, at least
    `num_rows` and `num_steps` steps of them, is as bad; clear_at: cleared when each of the last
    `clear_rows` is better. Where raise_at is the smaller of the two, small values are bad. about:
    who it is, given the same rows, and since which step if that is not the first of those rows.
    """

    name: str
    title: str
    measure: Callable[[MetricsRow, MetricsRow], float | None]
    raise_at: float
    clear_at: float
    num_rows: int
    meaning: str
    advice: str
    num_steps: int = 0
    clear_rows: int = 5
    about: Callable[[MetricsRow, MetricsRow], tuple[str, int | None]] = lambda row, before: (
        "",
        None,
    )

    def beyond(self, value: float, bound: float) -> bool:
        """Whether a value is on the bad side of a bound."""
        # the order of the two bounds tells which side is bad, so there is no third field to
        # contradict it
        return value <= bound if self.raise_at < self.clear_at else value >= bound


def _fake_loss(row: MetricsRow, before: MetricsRow) -> float | None:
    """The discriminator's loss on predictions, where it is right about nearly all label maps.

    Else as if undecided.
    """
    if DISCRIMINATOR_FAKE not in row or DISCRIMINATOR_ACCURACY not in row:
        return None
    # A small loss alone is no proof: it may be small since everything is called fake.
    if row[DISCRIMINATOR_ACCURACY] < 0.9:
        return math.log(2)
    return row[DISCRIMINATOR_FAKE] * _as_bce(before)


def _both_losses(row: MetricsRow, before: MetricsRow) -> float | None:
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


def _influence(row: MetricsRow, before: MetricsRow) -> float | None:
    # at weight 0 the term is only watched, by intention
    return row.get(RATIO) if row.get(ADVERSARIAL_WEIGHT, 0) > 0 else None


def _confident(row: MetricsRow, before: MetricsRow) -> float | None:
    # before its start the term is not meant to do anything
    return row.get(CONFIDENT_SHARE) if row.get(CONSISTENCY_WEIGHT, 0) > 0 else None


def _not_finite(row: MetricsRow, before: MetricsRow) -> float | None:
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


def _growth(row: MetricsRow, before: MetricsRow) -> float | None:
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


def _given_up(row: MetricsRow, before: MetricsRow) -> dict[str, int]:
    """Those that were lacking for long, the most frequent first, and since which step."""
    found = {}
    for name, (first, times) in before.get(UNPREDICTED, {}).items():
        if times >= MIN_EVALUATIONS and row["step"] - first >= MIN_UNPREDICTED_STEPS:
            found[name] = first
    return dict(sorted(found.items(), key=lambda item: -row.get(item[0], 0.0)))


def _num_given_up(row: MetricsRow, before: MetricsRow) -> float | None:
    # of evaluations alone: a batch of some crops lacks classes by chance
    return float(len(_given_up(row, before))) if MEAN_IOU in row else None


def _who_is_given_up(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    found = _given_up(row, before)
    named = [f"{name.removeprefix(NEVER_PREDICTED)} {row[name]:.2%}" for name in found]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return f"{', '.join(named[:MAX_NAMED])} of the labels{more}", min(found.values(), default=None)


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


def teaches(row: MetricsRow) -> bool:
    """Whether the teacher is confident of enough pixels to teach by, and to miss a class among."""
    return (_confident(row, {}) or 0.0) >= MIN_CONFIDENT


def _left_out(row: MetricsRow, before: MetricsRow) -> dict[str, tuple[int, float]]:
    """Classes that were lacking for long though labels show them, the most frequent first: since
    which step, and their share of the labelled pixels.
    """
    found = {}
    for name, (first, rows, total) in before.get(UNKEPT, {}).items():
        # both, as rows may be 1 or 1,000 steps apart
        is_long = rows >= MIN_UNKEPT_ROWS and row["step"] - first >= MIN_UNKEPT_STEPS
        if is_long and total / rows >= MIN_LABELLED_SHARE:
            found[name.removeprefix(CLASS_SHARE)] = (first, total / rows)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _num_left_out(row: MetricsRow, before: MetricsRow) -> float | None:
    return float(len(_left_out(row, before))) if teaches(row) else None


def _who_is_left_out(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    found = _left_out(row, before)
    named = [f"{name} {share:.2%}" for name, (_, share) in found.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    since = min((first for first, _ in found.values()), default=None)
    return f"{', '.join(named[:MAX_NAMED])} of the labelled pixels{more}", since


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


def _dominance(row: MetricsRow, before: MetricsRow) -> float | None:
    return _dominant(row)[1] if teaches(row) else None


def _who_dominates(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    name, share = _dominant(row)
    labelled = row.get(LABELLED_SHARE + name, 0.0)
    return f"{name}: {share:.1%} of the confident pixels, {labelled:.1%} of the labelled", None


def _wrong_though_sure(row: MetricsRow, before: MetricsRow) -> float | None:
    """The share of wrong pixels among confident ones, where nearly all are; else 0."""
    if CONFIDENT_AGREEMENT not in row:
        return None
    # a threshold that few pixels reach still chooses: wrong ones are then another check's matter
    is_sure = row[HELD_OUT_CONFIDENT] >= NEARLY_ALL
    return 1.0 - row[CONFIDENT_AGREEMENT] if is_sure else 0.0


def _fallen(row: MetricsRow, before: MetricsRow) -> float | None:
    """How far the teacher's agreement with held-out labels is below its best so far."""
    # while it teaches: an average of untrained weights is not its own doing
    if AGREEMENT not in row or not teaches(before):
        return None
    # of all pixels: among the confident ones it falls as more, and so harder ones, are confident
    return max(0.0, float(before.get(BEST_AGREEMENT, 0.0)) - row[AGREEMENT])


def _wait_share(row: MetricsRow, before: MetricsRow) -> float | None:
    if DATA_WAIT_SECONDS not in row or not row.get(STEP_SECONDS):
        return None
    return row[DATA_WAIT_SECONDS] / row[STEP_SECONDS]


def _who_is_slow(row: MetricsRow, before: MetricsRow) -> tuple[str, int | None]:
    # of the section in which it loses most; rows of earlier versions have none
    beyond = {name: seconds for name, seconds in row.items() if name.startswith(EXCESS)}
    most = max(beyond, key=lambda name: beyond[name], default="")
    where = f", in {most.removeprefix(EXCESS)}" if most else ""
    return f"rank {row[SLOWEST_RANK]:.0f}{where}", None


def _slowest(row: MetricsRow, before: MetricsRow) -> float | None:
    """How much slower the slowest rank is; 1 where it is another one than in the row before."""
    if SLOWEST_RANK not in row:
        return None
    # some rank always is the slowest; only the same one again and again is a slow machine
    return row[SLOWEST_RATIO] if row[SLOWEST_RANK] == before.get(SLOWEST_RANK) else 1.0


# of these, as every network that explodes shows in them, and as they begin at their highest: others
# may begin with few pixels, or with a weight that is yet to come
LEVELLED = (CROSS_ENTROPY, SEGMENTOR_LOSS, DISCRIMINATOR_REAL, DISCRIMINATOR_FAKE)
# in the row before, by distseg.tracking.health: the level that a loss began at, and the highest
# that it may have begun at
LEVEL, HIGHEST_LEVEL = "level/", "level"
UNDECIDED = "level of an undecided discriminator"  # likewise: its loss on either kind of map
OF_DOMAINS = "discriminator of domains"  # likewise: whether it tells domains apart
LEVEL_ROWS = 5  # whose median is the level
MEAN_LEVEL = 100.0  # of means over pixels: ln 255 = 5.5 nats, and room for the weights of terms
SUM_LEVEL = 1e6  # of sums over an image's pixels, 4 nats at each of 512 x 512


def levels_of(config: Mapping[str, Any]) -> MetricsRow:
    """What `Health` starts from: a run's levels, by its configuration under dotted names."""
    is_mean = config.get("loss.ce_reduction"), config.get("loss.adv_reduction")
    form = FORMS.get(str(config.get("loss.adv_form")), FORMS[DEFAULT])
    return {
        HIGHEST_LEVEL: MEAN_LEVEL if is_mean == ("mean_valid", "mean") else SUM_LEVEL,
        UNDECIDED: form.undecided,
        OF_DOMAINS: config.get("mode") in ADAPTATION,
    }


# in the row before, by distseg.tracking.health: of each class that no prediction has, the step of
# the first evaluation that says so, and how many in a row do
UNPREDICTED = "unpredicted"
# the rarest classes come late: in the first evaluations they are missing in good runs, too
MIN_EVALUATIONS, MIN_UNPREDICTED_STEPS = 3, 200
MAX_NAMED = 5
# likewise: of each class that confident pseudo-labels lack, see `unkept`; and the teacher's best
# agreement with the labels of held-out images
UNKEPT, BEST_AGREEMENT = "unkept", "best agreement"
# of the confident pixels of a step: 0.01 % of 8 crops of 240 x 240 are 46 pixels, of an object's
# edge. A class that labels show fifty times as much is missing, not rare.
UNKEPT_BELOW, MIN_LABELLED_SHARE = 1e-4, 5e-3
MIN_UNKEPT_ROWS, MIN_UNKEPT_STEPS = 10, 200
MIN_CONFIDENT = 0.05  # of the unlabelled pixels; of fewer, teacher_is_unsure tells soon enough
DOMINANT_LABEL = 0.6  # of two classes one may well have most pixels, of the labels too
NEARLY_ALL = 0.9  # of the pixels

CHECKS = (
    Check(
        "discriminator_has_won",
        "the discriminator has won",
        _fake_loss,
        # a public system whose adversary had no effect any more ended at 0.034; recorded: means of
        # 5 rows from 0.16 on
        raise_at=0.08,
        clear_at=0.12,
        num_rows=5,
        meaning="It tells nearly every prediction from ground truth, and is sure of it: what it "
        "still teaches the "
        "segmentor is to look like one-hot maps, and few pixels are believed in semi-supervised "
        "training.",
        advice="Lower discriminator_optimizer.lr (a third), use loss.real_target=0.9 or "
        "loss.real_map=scaling, or a "
        "smaller discriminator (discriminator.options.width).",
    ),
    Check(
        "discriminator_is_blind",
        "the discriminator is blind",
        _both_losses,
        # ln 2 = 0.693 is what an answer that does not look costs; recorded: 0.65 at step 50, below
        # 0.5 from step 90 on
        raise_at=0.68,
        clear_at=0.66,
        num_rows=15,
        num_steps=150,
        meaning="It cannot tell predictions from ground truth, so that its gradient is noise. "
        "(Only a perfect "
        "segmentor deserves that.)",
        advice="Raise discriminator_optimizer.lr (three times), give it more steps "
        "(alternation=blocks, "
        "loss.adv_start_step), or a discriminator that sees more.",
    ),
    Check(
        "no_influence",
        "the adversarial term has no influence",
        _influence,
        # a public system's term was 1.3e-4 of its loss; a healthy run (lambda 0.01) passes 1e-3
        # near step 40, while its discriminator begins to see, and 4e-3 at step 70
        raise_at=1e-3,
        clear_at=3e-3,
        num_rows=10,
        num_steps=100,
        meaning="Its gradient at the segmentor's output is less than a thousandth of the cross "
        "entropy's: this is "
        "supervised training at the price of an adversarial one.",
        advice="Raise loss.adv_weight, and look at the reductions: a mean beside a sum over "
        "pixels weighs nothing.",
    ),
    Check(
        "mask_is_empty",
        "the confidence mask is empty",
        lambda row, before: row.get(MASK_SHARE),
        # recorded: 0.09 to 0.98; at 0.1 % a batch of eight 240 x 240 images has 460 pixels left, of
        # one object's edge
        raise_at=1e-3,
        clear_at=5e-3,
        num_rows=5,
        meaning="The discriminator believes no pixel of the unlabelled images, so that the "
        "semi-supervised term is 0.",
        advice="Lower semi.threshold, start later (semi.start_step), or weaken the discriminator "
        "(discriminator_optimizer.lr); one that has won believes nothing.",
    ),
    Check(
        "teacher_is_unsure",
        "the teacher is never sure",
        _confident,
        # on 71 labels of Stanford Background a teacher was sure of 14 % of the pixels at step 60
        # and of 27 % at step 70, after 50 steps of labels alone
        raise_at=1e-3,
        clear_at=5e-3,
        num_rows=10,
        num_steps=100,
        meaning="No pixel of the unlabelled images is above consistency.threshold, so that the "
        "consistency term is 0: this is training on the labels alone at twice its price.",
        advice="Lower consistency.threshold, or start later (consistency.start_step), when the "
        "labels have taught it something; with consistency.gate=score the discriminator may let "
        "no image through: lower consistency.gate_probability, or take gate=rank.",
    ),
    Check(
        "class_never_kept",
        "pseudo-labels lack a class",
        _num_left_out,
        # classes, after MIN_UNKEPT_ROWS
        raise_at=1.0,
        clear_at=0.5,
        num_rows=1,
        clear_rows=1,
        about=_who_is_left_out,
        meaning="The labels show it, and no confident pixel did for 200 steps or more: unlabelled "
        "images teach that it does not exist.",
        advice="Lower consistency.threshold; draw it more often (data.sampling=rare_class) or "
        "weigh it more (loss.class_weights=median_frequency); start later "
        "(consistency.start_step).",
    ),
    Check(
        "pseudo_labels_collapse",
        "pseudo-labels are nearly all of one class",
        _dominance,
        # recorded: a sound teacher of 71 labels had at most 0.83 of its confident pixels in one
        # of 8 classes, ten steps after it began
        raise_at=0.95,
        clear_at=0.9,
        num_rows=10,
        num_steps=100,
        about=_who_dominates,
        meaning="The labels have other classes, and the teacher is sure of one alone: it teaches "
        "itself to see nothing else.",
        advice="Go on from an earlier checkpoint, or begin anew, with a later and smaller term "
        "(consistency.start_step, consistency.weight), a higher consistency.threshold and a "
        "slower teacher (ema_decay).",
    ),
    Check(
        "teacher_is_overconfident",
        "the teacher is sure, and wrong",
        _wrong_though_sure,
        # of the pixels that it is sure of; a threshold of 0.95 promises at most 0.05
        raise_at=0.3,
        clear_at=0.25,
        num_rows=2,
        clear_rows=1,
        meaning="It is confident of nine in ten pixels of the held-out images, and less than seven "
        "in ten of these are right: the threshold chooses nothing, and errors are taught.",
        advice="Raise consistency.threshold; lower consistency.weight or start later "
        "(consistency.start_step), so that the labels teach more than it does.",
    ),
    Check(
        "agreement_falls",
        "the teacher gets worse",
        _fallen,
        # of all pixels of the held-out images, in the mean of two evaluations, which does not
        # happen by chance to some images of 10^5 pixels each
        raise_at=0.05,
        clear_at=0.02,
        num_rows=2,
        clear_rows=1,
        meaning="It is right about fewer pixels of the held-out images than before, by a twentieth "
        "of all: its errors grow by being taught.",
        advice="Go on from the checkpoint before; lower consistency.weight, raise "
        "consistency.threshold or ema_decay.",
    ),
    Check(
        "not_finite",
        "a loss or gradient is not finite",
        _not_finite,
        raise_at=0.2,
        clear_at=1e-9,
        num_rows=1,
        clear_rows=10,
        meaning="Such a step's update is left out on all ranks; max_skips of them in a row end "
        "the run.",
        advice="Lower the learning rate of the network that grad_norm names, or clip_norm; with "
        "fp16 try bf16 or fp32; "
        "look at the data with `distseg inspect`.",
    ),
    Check(
        "exploding",
        "a loss explodes",
        _growth,
        # recorded: never above its first rows' median by more than a fifth; a hundred times is no
        # noise of any batch
        raise_at=2.0,
        clear_at=1.0,
        num_rows=1,
        meaning="It is 100 times what it was in the first rows, or more than an untrained network "
        "has: the weights run away, and it will not be finite for long.",
        advice="Lower the learning rate of the network that grad_norm names, or set clip_norm; "
        "go on from an earlier checkpoint, as the weights since are spoilt.",
    ),
    Check(
        "class_never_predicted",
        "a class is never predicted",
        _num_given_up,
        # classes, after MIN_EVALUATIONS
        raise_at=1.0,
        clear_at=0.5,
        num_rows=1,
        clear_rows=1,
        about=_who_is_given_up,
        meaning="Validation labels have it, and no prediction did in three evaluations or more: "
        "its IoU is 0.",
        advice="Look how much of it the training labels have (`distseg inspect`); draw it more "
        "often (data.sampling=rare_class) or weigh it more "
        "(loss.class_weights=median_frequency); train longer.",
    ),
    Check(
        "data_starved",
        "training waits for data",
        _wait_share,
        # what is waited for is what could be gained; recorded: below 1 %
        raise_at=0.1,
        clear_at=0.05,
        num_rows=5,
        meaning="More than a tenth of a step is spent waiting for images on the rank that waits "
        "longest.",
        advice="Raise data.num_threads; put shards or data.cache_dir on a local disk; look at "
        "what else uses the "
        "machine's cores.",
    ),
    Check(
        "slow_rank",
        "one rank is slower than the others",
        _slowest,
        # a fifth is far beyond the 1 % by which equal GPUs differ from step to step
        raise_at=1.2,
        clear_at=1.1,
        num_rows=10,
        about=_who_is_slow,
        meaning="The same rank needs a fifth more for its own part of a step, again and again, and "
        "all others wait for it at every step.",
        advice="Look at that rank's machine: another job, a hot or throttled GPU; where it is slow "
        "in data, a slow disk or fewer cores.",
    ),
)
NAMED = {check.name: check for check in CHECKS}
