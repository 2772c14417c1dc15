"""metrics.jsonl: what is written can be read back, whatever was killed or resumed in between."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distseg.config.schema import TrackingConfig
from distseg.distributed.ranks import Ranks
from distseg.runs import environment
from distseg.tracking.tracker import NullTracker, open_tracker, read_metrics
from shards.errors import InputError

OFF = TrackingConfig(wandb="disabled")


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_what_was_logged_is_read_back_non_finite_values_included(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, OFF, {}, None, True)
    values = {"a": 0.1, "b": math.nan, "c": math.inf, "d": -math.inf, "e": np.float32(2.5)}
    tracker.log(3, values)
    tracker.log(3, {"val/mean_iou": 0.25})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    tracker.finish()
    assert {name: first[name] for name in "acde"} == {name: values[name] for name in "acde"}
    assert math.isnan(first["b"]) and first["step"] == 3
    assert second["val/mean_iou"] == 0.25 and second["time"] >= first["time"] > 1.7e9


def test_each_line_is_strict_json(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, OFF, {}, None, True)
    tracker.log(1, {"x": math.nan, "y": 1e-300, "z": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["y"] == 1e-300
    tracker.finish()


def test_resume_takes_away_exactly_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, OFF, {}, None, True)
    for step in range(10, 60, 10):
        tracker.log(step, {"loss": step / 7})
    tracker.finish()
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()

    tracker = open_tracker(tmp_path, OFF, {}, 30, True)
    assert path.read_text().splitlines() == before[:3]
    tracker.log(40, {"loss": 1.0})
    tracker.finish()
    assert steps(path) == [10, 20, 30, 40]

    open_tracker(tmp_path, OFF, {}, None, True).finish()
    assert steps(path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["health.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", ['{"step": 30, "lo', '{"step"', "{", "\x00\x00\x00", '{"step": 30}x']
)
def test_a_line_torn_by_a_kill_is_repaired(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "time": 1}\n{"step": 20, "time": 2}\n' + torn)
    assert steps(path) == [10, 20]
    tracker = open_tracker(tmp_path, OFF, {}, 20, True)
    tracker.log(30, {})
    tracker.finish()
    assert steps(path) == [10, 20, 30]
    assert path.read_text().count("\n") == 3


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\nnonsense\n{"step": 20}\n')
    with pytest.raises(InputError, match="line 2 of"):
        read_metrics(path)
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "other.jsonl")


def test_every_logged_line_survives_sigkill(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from distseg.config.schema import TrackingConfig
from distseg.tracking.tracker import open_tracker
tracker = open_tracker(Path({str(tmp_path)!r}), TrackingConfig(wandb="disabled"), {{}}, None, True)
for step in range(500):
    tracker.log(step, {{"loss": step / 3}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert result.returncode == -signal.SIGKILL
    assert steps(tmp_path / "metrics.jsonl") == list(range(500))


def test_wandb_is_not_even_imported_where_it_is_disabled(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from distseg.config.schema import TrackingConfig
from distseg.tracking.tracker import open_tracker
tracker = open_tracker(Path({str(tmp_path)!r}), TrackingConfig(wandb="disabled"), {{}}, None, True)
tracker.log(1, {{"loss": 1.0}})
tracker.finish()
assert "wandb" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=True
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["health.json", "metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path / "run", OFF, {}, None, enabled=False)
    tracker.log(1, {"loss": 1.0})
    tracker.image(1, "x", tmp_path / "missing.png")
    tracker.finish()
    assert isinstance(tracker, NullTracker) and not (tmp_path / "run").exists()


def test_event_files_hold_each_step_once_after_a_restart(tmp_path: Path) -> None:
    loader = pytest.importorskip(
        "tensorboardX.proto.event_pb2", reason="pip install -e '.[tensorboard]'"
    )
    settings = TrackingConfig(wandb="disabled", tensorboard=True)
    for steps, resume_step in ((range(10, 60, 10), None), (range(40, 70, 10), 30)):
        tracker = open_tracker(tmp_path, settings, {}, resume_step, True)
        for step in steps:
            tracker.log(step, {"loss/segmentor": step / 8})
        tracker.image(step, "samples/a", np.full((4, 6, 3), 7, np.uint8))
        tracker.finish()
    seen: dict[int, float] = {}
    pictures = 0
    for path in sorted(
        (tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
    ):
        for event in events(path.read_bytes(), loader.Event):
            if event.session_log.status == 1:  # START: a reader drops what is at this step or later
                seen = {step: value for step, value in seen.items() if step < event.step}
            for value in event.summary.value:
                pictures += value.HasField("image")
                if value.tag == "loss/segmentor":
                    seen[event.step] = value.simple_value
    assert seen == {step: step / 8 for step in range(10, 70, 10)} and pictures == 2


def events(data: bytes, kind: Any) -> list[Any]:
    """TFRecord: length (8 bytes) and its checksum (4), the record and its checksum (4)."""
    found, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        found.append(kind.FromString(data[position + 12 : position + 12 + length]))
        position += length + 16
    return found


def test_facts_of_the_environment_are_written_and_nothing_else_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JWT", "planted-secret-value")
    monkeypatch.setenv("MY_SETTING", "planted-secret-value")
    found = environment.facts(Ranks(0, 3, 0, torch.device("cpu")))
    open_tracker(tmp_path, OFF, {"environment": found}, None, True).finish()
    written = (tmp_path / "environment.json").read_text()
    assert json.loads(written) == found and "planted-secret-value" not in written
    assert found["slurm"] == {"job_id": "4711"} and found["world_size"] == 3
    assert found["versions"]["torch"] == torch.__version__


def test_the_code_version_is_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert environment.code_version(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert environment.code_version(tmp_path) == commit[:12]
    (tmp_path / "a").write_text("2")
    assert environment.code_version(tmp_path) == commit[:12] + "-dirty"
