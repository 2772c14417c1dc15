"""What is looked for in a run's signals, when it is told, what it means and what to try.

Thresholds stand with their source. "Recorded" are 240 logged rows of six runs of
`preset=stanford_semi` (three seeds, with and without unlabelled images), which ended as well as
without an adversary, and of teachers two runs of `preset=stanford_consistency`, one of which
collapses; tests/data/health holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distseg.tracking import signs
from distseg.tracking.signs import MetricsRow


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


CHECKS = (
    Check(
        "discriminator_has_won",
        "the discriminator has won",
        signs.fake_loss,
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
        "domains_are_told_apart",
        "the discriminator tells the domains apart",
        signs.target_loss,
        # as of discriminator_has_won: it is the same loss of the same networks
        raise_at=0.08,
        clear_at=0.12,
        num_rows=5,
        meaning="It tells nearly every prediction for the target from those for the source, and is "
        "sure of it: so the adversarial term brings the target's no nearer, or goes by what no "
        "segmentor can change.",
        advice="Lower discriminator_optimizer.lr (a third), or raise loss.adv_weight; show both "
        "domains in strong views (strong.labelled=true), so that their colours tell less; or take "
        "a smaller discriminator (discriminator.options.width).",
    ),
    Check(
        "discriminator_is_blind",
        "the discriminator is blind",
        signs.both_losses,
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
        signs.influence,
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
        signs.mask_share,
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
        signs.confident,
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
        signs.num_left_out,
        # classes, after MIN_UNKEPT_ROWS
        raise_at=1.0,
        clear_at=0.5,
        num_rows=1,
        clear_rows=1,
        about=signs.who_is_left_out,
        meaning="The labels show it, and no confident pixel did for 200 steps or more: unlabelled "
        "images teach that it does not exist.",
        advice="Lower consistency.threshold; draw it more often (data.sampling=rare_class); start "
        "later (consistency.start_step); raise it in the pseudo-labels "
        "(consistency.logit_adjustment), which may run away with classes that are like it.",
    ),
    Check(
        "pseudo_labels_collapse",
        "pseudo-labels are nearly all of one class",
        signs.dominance,
        # recorded: a sound teacher of 71 labels had at most 0.83 of its confident pixels in one
        # of 8 classes, ten steps after it began
        raise_at=0.95,
        clear_at=0.9,
        num_rows=10,
        num_steps=100,
        about=signs.who_dominates,
        meaning="The labels have other classes, and the teacher is sure of one alone: it teaches "
        "itself to see nothing else.",
        advice="Go on from an earlier checkpoint, or begin anew, with a later and smaller term "
        "(consistency.start_step, consistency.weight), a higher consistency.threshold and a "
        "slower teacher (ema_decay).",
    ),
    Check(
        "teacher_is_overconfident",
        "the teacher is sure, and wrong",
        signs.wrong_though_sure,
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
        signs.fallen,
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
        signs.not_finite,
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
        signs.growth,
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
        signs.num_given_up,
        # classes, after MIN_EVALUATIONS
        raise_at=1.0,
        clear_at=0.5,
        num_rows=1,
        clear_rows=1,
        about=signs.who_is_given_up,
        meaning="Validation labels have it, and no prediction did in three evaluations or more: "
        "its IoU is 0.",
        advice="Look how much of it the training labels have (`distseg inspect`); draw it more "
        "often (data.sampling=rare_class), give it a margin (loss.logit_adjustment=0.5) or "
        "weigh it more (loss.class_weights=median_frequency); train longer.",
    ),
    Check(
        "target_loses_class",
        "the target loses a class",
        signs.num_lost,
        # classes, after MIN_EVALUATIONS
        raise_at=1.0,
        clear_at=0.5,
        num_rows=1,
        clear_rows=1,
        about=signs.who_is_lost,
        meaning="Predictions for the source have it, and fewer than one in 10,000 pixels of the "
        "target are taken for it, in three evaluations or more. Where the target shows it, "
        "adaptation has pushed it out.",
        advice="Lower loss.adv_weight, semi.entropy_weight or consistency.weight, or start later; "
        "draw the class more often (data.sampling=rare_class), lay it over target images "
        "(consistency.mix_with=labelled). If the target has none of it, nothing is wrong.",
    ),
    Check(
        "target_collapses",
        "predictions for the target collapse",
        signs.relative_entropy,
        # ours: predictions that pass for the source's are about as sure as those; strong views of
        # the source alone do not make them four times as unsure
        raise_at=0.25,
        clear_at=0.35,
        num_rows=10,
        num_steps=100,
        meaning="Their entropy is less than a quarter of the source's, and there is no "
        "discriminator, or one at chance or always right: nothing holds them to what labels look "
        "like, and being sure of anything is rewarded.",
        advice="Lower semi.entropy_weight or consistency.weight, or start later; raise "
        "discriminator_optimizer.lr where it is at chance, lower it where it is always right; go "
        "on from an earlier checkpoint.",
    ),
    Check(
        "data_starved",
        "training waits for data",
        signs.wait_share,
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
        signs.slowest,
        # a fifth is far beyond the 1 % by which equal GPUs differ from step to step
        raise_at=1.2,
        clear_at=1.1,
        num_rows=10,
        about=signs.who_is_slow,
        meaning="The same rank needs a fifth more for its own part of a step, again and again, and "
        "all others wait for it at every step.",
        advice="Look at that rank's machine: another job, a hot or throttled GPU; where it is slow "
        "in data, a slow disk or fewer cores.",
    ),
    Check(
        "not_copied",
        "checkpoints are not copied",
        signs.copy_failures,
        # each is a request that failed six times over a quarter of a minute, or was refused
        raise_at=1.0,
        clear_at=0.5,
        num_rows=1,
        clear_rows=1,
        meaning="checkpoint.copy_to does not take them: where this node and run_dir are lost, so "
        "is what was learned since the last copy.",
        advice="Look at the bucket's rights and room, and at the network; the run itself goes on, "
        "and copies the newest checkpoint as soon as it can.",
    ),
)
NAMED = {check.name: check for check in CHECKS}
