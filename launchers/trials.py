"""The trials of a sweep: overrides from grids, zipped and listed values, and random draws.

Why not Optuna here: its samplers and pruners learn from trials that have ended, so they need a
process or a database that lives as long as the sweep, and trials that start one after another. A
sweep is one array of jobs, all known and checked before the first is submitted; nothing has to stay
alive on a login node, and the same plan gives the same trials. Where a search that learns is worth
it, an objective of Optuna is three lines around `launchers.submit`, which runs, requeues and
resumes each trial as ever:

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        job = submit("preset=voc", f"segmentor_optimizer.lr={lr}", f"run_dir=runs/{trial.number}")
        return job.result()["val/mean_iou"]
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from shards.errors import InputError

Trial = dict[str, Any]  # key of the configuration -> value

EXAMPLE = """\
base: [preset=stanford, steps=500]                # of every trial
grid: {loss.adv_weight: [0, 0.01], seed: [0, 1]}  # every combination
zip: {segmentor_optimizer.lr: [1e-3, 1e-2], segmentor_optimizer.name: [adamw, sgd]}  # in pairs
list: [{ema_decay: 0}, {ema_decay: 0.99, schedule.warmup_steps: 100}]  # as they are
random:
  count: 8
  seed: 0
  values: {schedule.power: {low: 0.1, high: 10, log: true}, data.crop_px: [240, 320]}
"""


def from_file(path: Path) -> dict[str, Any]:
    """The plan in a YAML file. Raises InputError when it is none."""
    try:
        # safe_load: a plan may come from others, and YAML's tags can call code
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: {' '.join(str(error).split())}", "a YAML file", "correct it"
        ) from None
    if not isinstance(plan, dict):
        raise InputError(
            f"{path}: {type(plan).__name__}", f"a mapping, for example\n{EXAMPLE}", "correct it"
        )
    return plan


def expand(plan: dict[str, Any]) -> list[list[str]]:
    """The overrides of every trial of a plan with the parts of EXAMPLE; several parts are combined,
    each with each.

    The same plan gives the same trials in the same order. Raises InputError for a plan that cannot
    be read.
    """
    parts: dict[str, Callable[[Any], list[Trial]]] = {
        "grid": _grid,
        "zip": _zip,
        "list": _list,
        "random": _random,
    }
    unknown = plan.keys() - parts.keys() - {"base"}
    if unknown:
        raise _bad(
            f"{sorted(unknown, key=str)[0]!r} in the plan", f"some of: base, {', '.join(parts)}"
        )
    base = plan.get("base", [])
    if not isinstance(base, list) or not all(
        isinstance(word, str) and "=" in word for word in base
    ):
        raise _bad(f"base: {base!r}", "a list of key=value")
    # in the order of `parts`, not of the file: a plan whose lines were moved gives the same trials
    tables = [parts[name](plan[name]) for name in parts if name in plan]
    merged = [_merge(combination) for combination in itertools.product(*tables)]
    found: dict[tuple[str, ...], None] = {}  # an ordered set: what is drawn twice is run once
    for trial in merged:
        # as text, as a person would write them: a trial can be repeated by hand from the table
        overrides = [f"{key}={_text(value)}" for key, value in trial.items()]
        found[tuple(base + overrides)] = None
    return [list(overrides) for overrides in found]


def _merge(combination: tuple[Trial, ...]) -> Trial:
    merged: Trial = {}
    for trial in combination:
        # the later value would win in silence, and half of the trials be the same
        both = merged.keys() & trial.keys()
        if both:
            raise _bad(
                f"{sorted(both, key=str)[0]} in two parts of the plan", "every key in one part"
            )
        merged |= trial
    return merged


def _grid(values: Any) -> list[Trial]:
    columns = _columns("grid", values)
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]


def _zip(values: Any) -> list[Trial]:
    columns = _columns("zip", values)
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise _bad(f"zip: {lengths} values", "lists of one length")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _list(trials: Any) -> list[Trial]:
    if (
        not isinstance(trials, list)
        or not trials
        or not all(isinstance(trial, dict) for trial in trials)
    ):
        raise _bad(f"list: {trials!r}", "a list of mappings")
    return trials


def _random(draw: Any) -> list[Trial]:
    if not isinstance(draw, dict) or not isinstance(draw.get("values"), dict):
        raise _bad(f"random: {draw!r}", "count, seed and values")
    count, seed = draw.get("count"), draw.get("seed", 0)
    if not isinstance(count, int) or count < 1 or not isinstance(seed, int):
        raise _bad(
            f"random: count {count!r}, seed {seed!r}", "a count of at least 1 and a whole seed"
        )
    # a generator of its own: a plan gives the same trials whatever else draws numbers
    generator = random.Random(seed)
    trials = []
    for _ in range(count):
        trials.append({key: _draw(key, spec, generator) for key, spec in draw["values"].items()})
    return trials


def _draw(key: str, spec: Any, generator: random.Random) -> Any:
    """One of a list, or a number of 6 digits from {low, high}, log-uniform with log: true."""
    if isinstance(spec, list) and spec:
        return generator.choice(spec)
    try:
        low, high, is_log = float(spec["low"]), float(spec["high"]), bool(spec.get("log", False))
        if not (low < high and (low > 0 or not is_log)):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise _bad(
            f"random: {key}: {spec!r}", "a list, or {low: a, high: b, log: true} with 0 < a < b"
        ) from None
    # six digits: they stand in names and tables, and say more than a search can tell apart
    if is_log:
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.6g}")
    return float(f"{generator.uniform(low, high):.6g}")


def _columns(part: str, values: Any) -> dict[str, list[Any]]:
    if (
        not isinstance(values, dict)
        or not values
        or not all(isinstance(v, list) and v for v in values.values())
    ):
        raise _bad(f"{part}: {values!r}", "a mapping of keys to lists of values")
    return values


def _text(value: Any) -> str:
    """A value as it is written in an override."""
    if value is None or isinstance(value, bool):
        # YAML's words: str(None) would arrive as the text "None"
        return {None: "null", True: "true", False: "false"}[value]
    # one line, however long: a line break would end the override
    if isinstance(value, (list, dict)):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return str(value)


def _bad(got: str, needed: str) -> InputError:
    return InputError(got, needed, f"correct it; an example:\n{EXAMPLE}")
