"""Do unlabelled images pay, or an adversary? Runs of several arms, paired by seed, and what each
gains over the first, with the 95 % interval of the paired difference.

Run: python -m benchmarks.accuracy PLAN [key=value ...] --out DIR [--seeds 0 1 2] [--arms ARM ...]
         [--over ARM] [--at-once N]

PLAN: unlabelled (71 of Stanford Background's labels), scenes (6 of 400 labels of generated scenes),
adversary (all of Stanford Background's labels) or adaptation (from generated scenes to Stanford
Background without labels, in data/scenes and data/stanford). key=value holds for every arm,
data.shards=DIR for example. A run that is done is not run again, one that was stopped goes on. The
scores are of the last step: nothing is chosen by validation images. --at-once 2 on two cores: one
thread each, which is faster than one after the other on both (docs/results.md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from distseg.evaluate.document import SAME_AUGMENTATION, SAME_DATA

SCORES = {
    "val/mean_iou": "mIoU",
    "val/pixel_accuracy": "pixel acc.",
    "val/boundary_f1": "boundary F1",
}
_SAME = (*SAME_DATA, "val/mean_iou")
# of Student's distribution, two-sided, by degrees of freedom
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


# of an arm by seed; of all arms
Scores = Mapping[int, Mapping[str, Any]]
Found = Mapping[str, Scores]


@dataclass(frozen=True)
class Plan:
    """common: words of every run; arms: further ones by name. What others are compared with is the
    first, unless told.
    """

    common: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]


# The adversary's ways beside a teacher. A discriminator that saw the images would know predictions
# by their strong views alone.
_BESIDE = (
    *("mode=semi_supervised", "semi.weight=0", "discriminator=fully_convolutional"),
    "discriminator_optimizer.lr=2e-5",
)
_ADVERSARIAL = ("loss.adv_weight=0.01", "semi.adv_weight=0.01")
_FEATURES, _GATE = "loss.feature_weight=0.0002", "consistency.gate=rank"
_CONDITIONED = ("discriminator=image_conditioned", "discriminator_optimizer.lr=3e-5")
_HINGE_R1 = ("loss.adv_form=hinge", "loss.r1_weight=1", "loss.r1_every=16")
_WITH_TEACHER = {
    "teacher": ("mode=consistency",),
    "teacher + adversary": (*_BESIDE, *_ADVERSARIAL),
    "teacher + features": (*_BESIDE, _FEATURES),
    "teacher + gate": (*_BESIDE, _GATE),
    "teacher + all": (*_BESIDE, *_ADVERSARIAL, _FEATURES, _GATE),
}
_SUPERVISED = {
    "supervised": ("mode=supervised",),
    "supervised, adjusted": ("mode=supervised", "loss.logit_adjustment=0.5"),
    "supervised, strong views": ("mode=supervised", "strong.labelled=true"),
}
_ACROSS, _TAUGHT = "preset=toy_stanford_adaptsegnet", "preset=toy_stanford_dacs"
_ADAPTED = {
    # what the others are compared with; they have its views, on the target as well
    "colour": ("preset=toy_stanford", "strong.labelled=true"),
    "source only": ("preset=toy_stanford",),
    # target images in the forward and in batch norm's statistics, and nothing learned of them
    "control": (_ACROSS, "loss.adv_weight=0"),
    "adaptsegnet": (_ACROSS,),
    "advent": (_ACROSS, "adaptation.input=self_information"),
    "minent": (
        *(_TAUGHT, "consistency.weight=0", "consistency.mix_with=unlabelled", "strong.mix=none"),
        *("semi.entropy_weight=0.01", "semi.entropy_start_step=50"),
        "semi.entropy_warmup_steps=100",
    ),
    "classmix": (_TAUGHT,),
    # A discriminator between domains needs images of one each, so target images are mixed in pairs,
    # and both domains from its first step on.
    "adversary + classmix": (
        *(_ACROSS, "loss.adv_start_step=100", "consistency.weight=1", "consistency.start_step=100"),
        *("consistency.warmup_steps=100", "consistency.threshold=0.9"),
        *("consistency.weighting=image", "strong.mix=classmix", "strong.mix_probability=1"),
    ),
    "oracle": ("preset=toy_stanford", "data.shards=data/stanford", "strong.labelled=true"),
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
            "hinge, R1": _HINGE_R1,
            "conditioned, features": (*_CONDITIONED, _FEATURES),
            "conditioned, features, hinge, R1": (*_CONDITIONED, _FEATURES, *_HINGE_R1),
        },
    ),
}


def run(words: Sequence[str], run_dir: Path, threads: int | None = None) -> dict[str, Any]:
    """The scores of a run, outlines too; it is trained and scored if that is not done.

    threads: of the run, which then writes to RUN_DIR.log; None: all, and to this terminal.
    """
    done = run_dir / "evaluation.json"
    if not done.is_file():
        told = [f"run_dir={run_dir}", "tracking.wandb=disabled"]
        _call(["-m", "distseg.train", *words, *told], run_dir, threads)
    scores: dict[str, Any] = json.loads(done.read_text())
    if (outlines := _outlines(run_dir, scores)) is None:
        _call(["-m", "distseg.evaluate", str(run_dir)], run_dir, threads)
        outlines = _outlines(run_dir, scores)
    assert outlines is not None, run_dir
    return outlines | scores


def _outlines(run_dir: Path, scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `distseg evaluate` wrote of the last step, on the same images in the same view."""
    for path in sorted(run_dir.glob(f"evaluation-step-{scores['step']:08d}-*.json")):
        found: dict[str, Any] = json.loads(path.read_text())
        same = all(found.get(key) == scores.get(key) for key in (*_SAME, *SAME_AUGMENTATION))
        if same and "val/boundary_f1" in found:
            return found
    return None


def _call(words: Sequence[str], run_dir: Path, threads: int | None) -> None:
    command = [sys.executable, *words]
    if threads is None:
        subprocess.run(command, check=True)
        return
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    # threads that wait for one another must not spin while another run wants the core
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with run_dir.with_name(f"{run_dir.name}.log").open("a") as log:
        try:
            subprocess.run(command, check=True, env=env, stdout=log, stderr=log)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{error}; its last words are in {log.name}") from error


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % interval; NaN of one."""
    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return mean, math.nan
    # beyond the table the last is a little too wide, never too narrow
    quantile = _T_95[min(count - 1, len(_T_95)) - 1]
    return mean, quantile * statistics.stdev(differences) / math.sqrt(count)


def table(found: Found, over: str) -> list[str]:
    """Markdown: a row an arm, of the seeds that it shares with the arm `over`."""
    base = found[over]
    gains = [f"{label} over {over} (95 %)" for label in SCORES.values()]
    lines = _head(["arm", "seeds", *SCORES.values(), *gains])
    for name, scores in found.items():
        seeds = sorted(scores.keys() & base.keys())
        if not seeds:
            continue
        cells = [name, ", ".join(map(str, seeds))]
        cells += [_percent(statistics.mean(scores[s][key] for s in seeds)) for key in SCORES]
        cells += ["" if name == over else _gain(scores, base, key) for key in SCORES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def classes_table(found: Found, over: str) -> list[str]:
    """Markdown: IoU of each class by the arm `over`, and by how much the others' is above it."""
    base, prefix = found[over], "val/iou/"
    names = [key.removeprefix(prefix) for key in next(iter(base.values())) if prefix in key]
    lines = _head([f"IoU of a class; of others over {over} (95 %)", *names])
    means = [statistics.mean(of[prefix + name] for of in base.values()) for name in names]
    lines.append(f"| {over} | {' | '.join(map(_percent, means))} |")
    for arm, scores in found.items():
        if arm != over and scores.keys() & base.keys():
            gains = [_gain(scores, base, prefix + name) for name in names]
            lines.append(f"| {arm} | {' | '.join(gains)} |")
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _gain(scores: Scores, base: Scores, key: str) -> str:
    """By how much a score is above the base's, in points, where both have it."""
    seeds = sorted(scores.keys() & base.keys())
    mean, half = interval([scores[seed][key] - base[seed][key] for seed in seeds])
    return f"{100 * mean:+.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of the plan; default: all")
    parser.add_argument("--over", metavar="ARM", help="what others are compared with; the first")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="runs beside one another, each with a share of the cores and a log of its own",
    )
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once}: at least 1 is needed")
    plan = PLANS[options.plan]
    names = list(plan.arms)
    over = options.over or names[0]
    if unknown := {over, *(options.arms or ())} - set(names):
        parser.error(f"no arm {sorted(unknown)} in {options.plan}, it has {names}")
    chosen = [name for name in names if name == over or name in (options.arms or names)]
    # seed by seed: whatever is stopped leaves pairs
    todo = [(name, seed) for seed in options.seeds for name in chosen]
    threads = None if options.at_once == 1 else max(1, _cores() // options.at_once)

    def place(name: str, seed: int) -> Path:
        return options.out / options.plan / f"{name.replace(' ', '_')}-{seed}"

    def one(name: str, seed: int) -> dict[str, Any]:
        seeds = (f"seed={seed}", f"data.labelled_seed={seed}")
        words = (*plan.common, *plan.arms[name], *seeds, *options.words)
        return run(words, place(name, seed), threads)

    found: dict[str, dict[int, Any]] = {name: {} for name in chosen}
    # apart, since they take no time and would make the end look near
    done = [pair for pair in todo if (place(*pair) / "evaluation.json").is_file()]
    for name, seed in done:
        found[name][seed] = one(name, seed)
    for name, seed, scores in finished([p for p in todo if p not in done], one, options.at_once):
        found[name][seed] = scores
    print(*table(found, over), "", *classes_table(found, over), sep="\n")
    print(conditions(threads or _cores()))


def finished(
    todo: Sequence[tuple[str, int]], one: Callable[[str, int], dict[str, Any]], at_once: int
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Arm, seed and scores as runs end; says after each how many are left and when they end."""
    began, workers = time.monotonic(), ThreadPoolExecutor(at_once)
    waiting = {workers.submit(one, name, seed): (name, seed) for name, seed in todo}
    print(f"{len(todo)} runs to do, {at_once} at once", flush=True)
    try:
        for number, future in enumerate(as_completed(waiting), 1):
            name, seed = waiting[future]
            scores = future.result()
            left = (time.monotonic() - began) / number * (len(todo) - number)
            end = datetime.now() + timedelta(seconds=left)
            score = f"mIoU {_percent(scores['val/mean_iou'])}; all by {end:%d %b %H:%M}"
            print(f"run {number} of {len(todo)} ({name}, seed {seed}): {score}", flush=True)
            yield name, seed, scores
    finally:
        # after one that failed none begins; those that run end by themselves, and are kept
        workers.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
