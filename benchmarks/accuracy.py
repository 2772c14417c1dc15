"""Do unlabelled images pay, or an adversary? Runs of several arms, paired by seed, and what each
gains over the first, with the 95 % interval of the paired difference.

Run: python -m benchmarks.accuracy PLAN [key=value ...] --out DIR [--seeds 0 1 2] [--arms NAME ...]

PLAN: unlabelled (71 of Stanford Background's labels), scenes (6 of 400 labels of generated scenes),
adversary (all of Stanford Background's labels) or adaptation (from generated scenes to Stanford
Background without labels, in data/scenes and data/stanford). key=value holds for every arm,
data.shards=DIR for example. A run that is done is not run again, one that was stopped goes on. The
scores are of the last step: nothing is chosen by validation images.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions

SCORES = ("val/mean_iou", "val/pixel_accuracy")
# of Student's distribution, two-sided, by degrees of freedom
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Plan:
    """common: words of every run; arms: further ones by name, the first is what others are compared
    with.
    """

    common: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]


# the adversary's ways beside a teacher
_BESIDE = ("mode=semi_supervised", "semi.weight=0")
_CONDITIONED = ("discriminator=image_conditioned", "discriminator_optimizer.lr=3e-5")
_WITH_TEACHER = {
    "teacher": ("mode=consistency",),
    "teacher + adversary": (*_BESIDE, "loss.adv_weight=0.01", "semi.adv_weight=0.01"),
    "teacher + features": (*_BESIDE, *_CONDITIONED, "loss.feature_weight=0.0002"),
    "teacher + gate": (*_BESIDE, *_CONDITIONED, "consistency.gate=rank"),
}
_SUPERVISED = {
    "supervised": ("mode=supervised",),
    "supervised, adjusted": ("mode=supervised", "loss.logit_adjustment=0.5"),
}
_ACROSS, _TAUGHT = "preset=toy_stanford_adaptsegnet", "preset=toy_stanford_dacs"
_ADAPTED = {
    "colour": ("preset=toy_stanford", "strong.labelled=true"),
    "source only": ("preset=toy_stanford",),
    "adaptsegnet": (_ACROSS,),
    "advent": (_ACROSS, "adaptation.input=self_information"),
    "minent": (
        *(_TAUGHT, "consistency.weight=0", "consistency.mix_with=unlabelled"),
        "semi.entropy_weight=0.01",
    ),
    "classmix": (_TAUGHT,),
    # a discriminator between domains needs images of one each: target images are mixed in pairs
    "adversary + classmix": (
        *(_ACROSS, "consistency.weight=1", "consistency.start_step=100"),
        *("consistency.warmup_steps=100", "consistency.threshold=0.9"),
        "consistency.weighting=image",
    ),
    "oracle": ("preset=toy_stanford", "data.shards=data/stanford"),
}
PLANS = {
    "adaptation": Plan((), _ADAPTED),
    "unlabelled": Plan(
        ("preset=stanford_consistency", "steps=1000"), {**_SUPERVISED, **_WITH_TEACHER}
    ),
    "scenes": Plan(("preset=toy_consistency",), {**_SUPERVISED, **_WITH_TEACHER}),
    "adversary": Plan(
        ("preset=stanford",),
        {
            "supervised": ("mode=supervised",),
            "adversarial": (),
            "hinge, R1": ("loss.adv_form=hinge", "loss.r1_weight=1", "loss.r1_every=16"),
            "conditioned, features": (
                "discriminator=image_conditioned",
                "loss.feature_weight=0.0002",
            ),
        },
    ),
}


def run(words: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """The scores of a run, which is trained if it is not done."""
    done = run_dir / "evaluation.json"
    if not done.is_file():
        told = [f"run_dir={run_dir}", "tracking.wandb=disabled"]
        subprocess.run([sys.executable, "-m", "distseg.train", *words, *told], check=True)
    return json.loads(done.read_text())


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % interval; NaN of one."""
    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return mean, math.nan
    # beyond the table the last is a little too wide, never too narrow
    quantile = _T_95[min(count - 1, len(_T_95)) - 1]
    return mean, quantile * statistics.stdev(differences) / math.sqrt(count)


def table(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Markdown: a row an arm, of the seeds that it shares with the first.

    found: {arm: {seed: scores}}.
    """
    base_name, base = next(iter(found.items()))
    lines = [
        f"| arm | seeds | mIoU | pixel acc. | mIoU over {base_name} (95 %) | pixel acc. over it |",
        "|---|---|---|---|---|---|",
    ]
    for name, scores in found.items():
        seeds = sorted(scores.keys() & base.keys())
        if not seeds:
            continue
        cells = [name, ", ".join(map(str, seeds))]
        cells += [_percent(statistics.mean(scores[s][key] for s in seeds)) for key in SCORES]
        for key in SCORES:
            mean, half = interval([scores[seed][key] - base[seed][key] for seed in seeds])
            width = "" if math.isnan(half) else f" ± {100 * half:.1f}"
            cells.append("" if name == base_name else f"{100 * mean:+.1f}{width}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", help="of the plan, beside its first; default: all")
    options = parser.parse_args()
    plan = PLANS[options.plan]
    names = list(plan.arms)
    chosen = [names[0], *(name for name in names[1:] if name in (options.arms or names))]
    found: dict[str, dict[int, Any]] = {name: {} for name in chosen}
    number = 0
    # seed by seed: whatever is stopped leaves pairs
    for seed in options.seeds:
        for name in chosen:
            number += 1
            print(f"run {number} of {len(chosen) * len(options.seeds)}: {name}, seed {seed}")
            seeds = (f"seed={seed}", f"data.labelled_seed={seed}")
            words = (*plan.common, *plan.arms[name], *seeds, *options.words)
            run_dir = options.out / options.plan / f"{name.replace(' ', '_')}-{seed}"
            found[name][seed] = run(words, run_dir)
        print(*table(found), sep="\n", flush=True)
    print(conditions(1))


if __name__ == "__main__":
    main()
