"""The GPU check: every test with a side on GPUs, then what a step costs there, as one JSON file and
one table.

Each part has a process and a time limit of its own: what fails or hangs in one does not stop the
others. At most 8 minutes on one GPU. Run, from the repository:
    python -m benchmarks.gpu [--out DIR]
and without a GPU, in small sizes, to see that it works: --device cpu --quick.
docs/gpu_check.md says how to read it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MINUTES = 8.0
# what the parts import besides torch; deepspeed, wandb and the exporters are used where they are
NEEDED = ("numpy", "cv2", "h5py", "hdf5plugin", "isal", "omegaconf", "pytest", "rich")
NEEDED += ("safetensors", "simplejpeg", "torch", "webdataset", "yaml")


def missing() -> list[str]:
    """The packages that are not here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def measured(name: str, device: str, quick: bool, folder: Path, limit: float) -> dict[str, Any]:
    """A part's outcome: "status", "seconds", "values" as far as it came, and "error"."""
    context = multiprocessing.get_context("forkserver")
    # imported once for all of them, and without a word to the GPU, which no fork could use then
    context.set_forkserver_preload(["benchmarks.gpu_parts", "distseg.train.run"])
    notes, log = folder / f"{name}.notes", folder / f"{name}.log"
    notes.unlink(missing_ok=True)
    process = context.Process(target=_run, args=(name, device, quick, notes, log))
    begun = time.monotonic()
    process.start()
    process.join(limit)
    is_late = process.is_alive()
    if is_late and process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.kill()
        process.join()
    values: dict[str, Any] = {}
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    for line in lines:
        with suppress(json.JSONDecodeError):  # half a line of one that was stopped
            values |= json.loads(line)
    notes.unlink(missing_ok=True)
    error = values.pop("error", "")
    if is_late:
        error = f"stopped after {limit:.0f} s, its limit"
    elif process.exitcode and not error:
        error = f"ended with {process.exitcode}"
    status = "late" if is_late else "failed" if error else "done"
    seconds = time.monotonic() - begun
    return {"status": status, "seconds": seconds, "values": values, "error": error}


def _run(name: str, device: str, quick: bool, notes: Path, log: Path) -> None:
    """A part, in a process of its own."""
    os.setsid()  # so that all that it starts can be ended with it
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from benchmarks.gpu_parts import ON_PURPOSE, PARTS, Setting

    def note(key: str, value: Any) -> None:
        with notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value}) + "\n")

    try:
        (PARTS | ON_PURPOSE)[name].run(Setting(device, quick, note))
    except BaseException as error:  # SystemExit too: its text is the reason
        traceback.print_exc()
        note("error", (str(error).strip().splitlines() or [type(error).__name__])[0])
        sys.exit(1)


def check(names: Sequence[str], device: str, quick: bool, folder: Path, end: float) -> list[Any]:
    """All parts, one after the other, and the report after each of them. end: of time.monotonic."""
    from benchmarks.conditions import _commit
    from benchmarks.gpu_parts import ON_PURPOSE, PARTS

    every, outcomes = PARTS | ON_PURPOSE, []
    head = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "commit": _commit()}
    head |= {"device": device, "quick": quick}
    for place, name in enumerate(names):
        left = end - time.monotonic()
        rest = sum(every[other].expected for other in names[place:])
        until = datetime.now() + timedelta(seconds=min(rest, max(0.0, left)))
        limit = min(every[name].limit, left)
        told = f"part {place + 1} of {len(names)}: {name}, at most {max(0.0, limit):.0f} s; "
        print(f"{told}all done at about {until:%H:%M:%S}", file=sys.stderr, flush=True)
        if limit < 1:
            outcome = {"status": "left out", "seconds": 0.0, "values": {}}
            outcome["error"] = "no time was left"
        else:
            outcome = measured(name, device, quick, folder, limit)
        outcomes.append({"part": name, **outcome})
        if outcome["error"]:
            print(f"  {name}: {outcome['error']}", file=sys.stderr, flush=True)
        write(head, outcomes, folder)  # after each, for one who stops it
        if name == "machine" and outcome["status"] != "done":
            break  # without the device nothing else can be measured
    return outcomes


def write(head: dict[str, Any], outcomes: list[Any], folder: Path) -> None:
    """gpu_check.json and gpu_check.md; whole, or those of before."""
    content = json.dumps(head | {"parts": outcomes}, indent=1) + "\n"
    for name, text in (("gpu_check.json", content), ("gpu_check.md", table(head, outcomes))):
        partial = folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def table(head: dict[str, Any], outcomes: list[Any]) -> str:
    """The report in Markdown."""
    found = {outcome["part"]: outcome for outcome in outcomes}
    about = found.get("machine", {}).get("values", {})
    facts = [about[name] for name in ("chip", "memory", "driver", "libraries") if name in about]
    lines = ["# GPU check", "", f"{head['date']}, commit {head['commit']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()] if facts else []
    if head["quick"] or head["device"] == "cpu":
        lines += ["", "**A dry run in small sizes: no figure here says anything of a GPU.**"]
    lines += ["", "| part | outcome | seconds | |", "|---|---|---|---|"]
    for part in outcomes:
        error = part["error"].replace("|", "/")
        lines.append(f"| {part['part']} | {part['status']} | {part['seconds']:.0f} | {error} |")
    lines += ["", *_verdict(found, head)]
    for part in outcomes:
        if part["values"] and part["part"] != "machine":
            lines += ["", f"## {part['part']}", "", "| what | value |", "|---|---|"]
            lines += [f"| {key} | {_shown(key, it)} |" for key, it in part["values"].items()]
    return "\n".join(lines) + "\n"


def _verdict(found: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """What was aimed at, beside what was found."""
    from benchmarks.gpu_parts import AIM_MS, LIMIT_MS

    step = found.get("step", {}).get("values", {})
    ours = step.get("ours, bf16, ms")
    if ours is None or head["quick"]:
        return []
    lines = [f"A step of 10 + 10 images takes {ours:.1f} ms; aimed at on an H200: {AIM_MS:.0f}; "]
    lines[0] += f"its arithmetic alone, at the convolutions' peak: {LIMIT_MS:.0f} there"
    if "ours, bf16, ms at peak" in step:
        lines[0] += f", {step['ours, bf16, ms at peak']:.1f} here"
    reference = found.get("reference", {}).get("values", {}).get("reference, fp32, ms")
    if reference is not None:
        lines.append(f"The reference's passes: {reference:.1f} ms, {reference / ours:.2f} times.")
    return [lines[0] + ".", *lines[1:]]


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(key, each) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{number} {name}" for name, number in value.items())
    if isinstance(value, float):
        return f"{value:.1%}" if "share" in key else f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every part is done; 1: one is not; 2: nothing could be started."""
    from benchmarks.gpu_parts import ON_PURPOSE, PARTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *ON_PURPOSE], metavar="PART")
    options = parser.parse_args(arguments)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    names = list(dict.fromkeys(["machine", *(options.parts or PARTS)]))
    end = time.monotonic() + 60 * options.minutes
    outcomes = check(names, options.device, options.quick, folder, end)
    print(f"\n{(folder / 'gpu_check.md').read_text(encoding='utf-8')}\nwritten to {folder}")
    return int(any(outcome["status"] != "done" for outcome in outcomes))


if __name__ == "__main__":
    if absent := missing():
        print(f"missing: {', '.join(absent)}; pip install -e '.[dev]', or make gpu-check")
        sys.exit(2)
    if "--ready" in sys.argv:
        sys.exit(0)
    sys.exit(main())
