"""W&B: the offline file holds the run's curves and pictures but no secret, and no failure stops
training.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distseg.config.schema import TrackingConfig
from distseg.tracking import wandb_run
from distseg.tracking.tracker import Tracker, open_tracker, read_metrics
from distseg.tracking.wandb_run import WandbRun, choose_mode, without_secrets

SECRET = "planted-secret-value-0123456789"
OPTIONS: dict[str, Any] = {
    "project": "distseg",
    "entity": None,
    "group": None,
    "tags": [],
    "name": "a",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no W&B settings of the machine, and two secrets that must show up nowhere."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    monkeypatch.setenv("PLANTED_PLAIN", SECRET + "-plain")
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--password={SECRET}"])


def records(path: Path) -> list[Any]:
    """Parse a .wandb file: a 7-byte header, then a LevelDB log in blocks of 32 KiB, its records
    protobuf.
    """
    from wandb.proto import wandb_internal_pb2

    data, found, pending, position = path.read_bytes(), [], b"", 7
    assert data[:4] in (b":W&B", b"")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a record header never crosses a block
            position += 32768 - position % 32768
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        body = data[position + 7 : position + 7 + length]
        if len(body) < length:  # still being written
            break
        assert checksum == zlib.crc32(bytes([kind]) + body)
        position += 7 + length
        pending = body if kind in (1, 2) else pending + body  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(pending))
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """One dict a row; what was logged as a picture is a dict, stored as (name, field) pairs."""
    rows: list[dict[str, Any]] = []
    for record in records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        rows.append({})
        for item in record.history.item:
            name, *field = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            place = rows[-1]
            for part in (name, *field)[:-1]:
                place = place.setdefault(part, {})
            place[(name, *field)[-1]] = value
    return rows


def offline_files(run_dir: Path) -> list[Path]:
    """Whole offline files, oldest first.

    The service writes a file's end just after finish() returns.
    """
    files = sorted(
        run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name
    )
    deadline = time.monotonic() + 10
    while not all(records(file)[-1:] and records(file)[-1].HasField("exit") for file in files):
        assert time.monotonic() < deadline, "W&B has not written the end of the run"
        time.sleep(0.05)
    return files


def write_run(run_dir: Path, steps: range, resume_step: int | None = None) -> Tracker:
    config = {
        "seed": 1,
        "loss": {"adv_weight": 0.01},
        "api_key": SECRET,
        "note": f"from {SECRET} on",
    }
    tracker = open_tracker(
        run_dir, TrackingConfig(wandb="offline", tags=["t"]), config, resume_step, True
    )
    for step in steps:
        tracker.log(step, {"loss/segmentor": 1 / step, "loss/discriminator_real": step / 3})
        if step % 20 == 0:
            tracker.log(step, {"val/mean_iou": step / 100})
            tracker.image(step, "samples/a", np.full((8, 12, 3), step, np.uint8), "a scene")
    return tracker


def test_offline_file_holds_curves_pictures_and_config_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two that W&B would stop over, here
    monkeypatch.setenv("WANDB_CONFIG_PATHS", str(tmp_path / "missing.yaml"))
    monkeypatch.setenv("WANDB_RESUME", "must")
    monkeypatch.setenv("WANDB_NOTES", "of the environment")
    run_dir = tmp_path / "voc_1"
    tracker = write_run(run_dir, range(10, 60, 10))
    tracker.summary({"goodput": 0.75})
    tracker.finish(0)
    (file,) = offline_files(run_dir)
    rows = history(file)
    told = [
        one.summary.update for one in records(file) if one.WhichOneof("record_type") == "summary"
    ]
    whole_run = {item.key: json.loads(item.value_json) for item in itertools.chain(*told)}
    assert whole_run["goodput"] == 0.75 and not any("goodput" in row for row in rows)

    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert [row["loss/segmentor"] for row in rows] == [1 / step for step in range(10, 60, 10)]
    assert [row.get("val/mean_iou") for row in rows] == [None, 0.2, None, 0.4, None]
    pictures = [row["samples/a"] for row in rows if "samples/a" in row]
    assert [(p["width"], p["height"], p["caption"]) for p in pictures] == [(12, 8, "a scene")] * 2
    for picture in pictures:
        assert (file.parent / "files" / picture["path"]).stat().st_size == picture["size"]

    (run,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("distseg", "voc_1", ["t"])
    assert run.notes == "of the environment"
    assert run.run_id == (run_dir / "wandb_id.txt").read_text().strip()
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 1 and config["loss"] == {"adv_weight": 0.01}

    axes = [
        record.metric for record in records(file) if record.WhichOneof("record_type") == "metric"
    ]
    assert "step" in {metric.name for metric in axes} and ("*", "step") in {
        (m.glob_name, m.step_metric) for m in axes
    }
    for path in run_dir.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert not list(run_dir.rglob("wandb-metadata.json")) and not list(
        run_dir.rglob("requirements.txt")
    )


def test_a_resumed_run_keeps_its_id_and_goes_on_at_its_step(tmp_path: Path) -> None:
    write_run(tmp_path, range(10, 60, 10)).finish(1)
    write_run(tmp_path, range(40, 80, 10), resume_step=30).finish(0)
    first, second = offline_files(tmp_path)
    assert first.name == second.name  # run-<id>.wandb
    assert [row["_step"] for row in history(second)] == [40, 50, 60, 70]
    assert [
        row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss/segmentor" in row
    ] == [*range(10, 80, 10)]


def test_an_id_that_is_no_name_of_a_folder_is_replaced_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "wandb_id.txt"
    for bad in ("../../victim", "a/b", ".x", "a b"):
        path.write_text(bad)
        caplog.clear()
        new = wandb_run._run_id(path)
        assert "is no id of a W&B run" in caplog.text and new == path.read_text().strip() != bad
        assert wandb_run._run_id(path) == new


def test_two_requeues_leave_one_id_steps_that_never_go_back_and_every_picture_and_table(
    tmp_path: Path,
) -> None:
    """Killed after a checkpoint, requeued, killed, requeued."""
    picture, mask = np.full((8, 12, 3), 9, np.uint8), np.eye(8, 12, dtype=np.uint8)
    for steps, resume_step in (
        (range(10, 60, 10), None),
        (range(40, 90, 10), 30),
        (range(80, 110, 10), 70),
    ):
        tracker = open_tracker(
            tmp_path,
            TrackingConfig(wandb="offline", group="g", job_type="sweep"),
            {},
            resume_step,
            True,
        )
        for step in steps:
            bad = {"loss/segmentor": float("nan") if step == 90 else 1 / step}
            tracker.log(step, {"loss/cross_entropy": 1 / step, **bad})
            tracker.masks(
                step, "masks/a", picture, {"label": mask, "prediction": 1 - mask}, ("sky", "road")
            )
            tracker.table(
                step, "classes", ("class", "IoU"), [("sky", step / 100), ("road", float("nan"))]
            )
        tracker.finish(1 if step < 100 else 0)
    files = offline_files(tmp_path)
    runs = [
        record.run
        for file in files
        for record in records(file)
        if record.WhichOneof("record_type") == "run"
    ]
    assert {run.run_id for run in runs} == {
        (tmp_path / "wandb_id.txt").read_text().strip()
    } and len(files) == 3
    assert {(run.run_group, run.job_type) for run in runs} == {("g", "sweep")}
    for file, expected in zip(
        files, (range(10, 60, 10), range(40, 90, 10), range(80, 110, 10)), strict=True
    ):
        rows = history(file)
        assert [row["_step"] for row in rows] == [row["step"] for row in rows] == list(expected)
        for row in rows:
            shown, table = row["masks/a"], row["tables/classes"]
            assert set(shown["masks"]) == {"label", "prediction"}
            for path in (shown["path"], shown["masks"]["label"]["path"], table["path"]):
                assert (file.parent / "files" / path).is_file(), path
            content = json.loads((file.parent / "files" / table["path"]).read_text())
            assert content["columns"] == ["class", "IoU"] and content["data"][0] == [
                "sky",
                row["step"] / 100,
            ]
    alerts = [
        record.alert
        for file in files
        for record in records(file)
        if record.WhichOneof("record_type") == "alert"
    ]
    assert [(alert.level, alert.title) for alert in alerts] == [
        ("ERROR", "a loss or gradient is not finite")
    ]
    table = (tmp_path / "tables" / "classes-step-00000100.csv").read_text().splitlines()
    assert table == ["class,IoU", "sky,1.0", "road,nan"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(
        range(10, 110, 10)
    )


def test_training_does_not_wait_while_wandb_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: WandbRun) -> Any:
        time.sleep(1.5)
        raise TimeoutError("no answer")

    monkeypatch.setattr(WandbRun, "_start", slow)
    started = time.perf_counter()
    tracker = write_run(tmp_path, range(1, 100))
    assert time.perf_counter() - started < 0.5
    tracker.finish(0)


def test_a_failure_is_one_warning_and_the_disk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(*args: object, **options: object) -> None:
        raise wandb.errors.UsageError("the server said\nno")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        tracker = write_run(tmp_path, range(1, 10))
        tracker.finish(0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert [record.getMessage() for record in caplog.records] == [
        "W&B stopped (UsageError: the server said no); this run goes on with metrics.jsonl only"
    ]


def test_without_a_network_an_online_run_is_written_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # refuses every connection
    wandb.teardown()  # the server is read from the environment once in a process
    monkeypatch.setattr(wandb_run, "_INIT_SECONDS", 2.0)
    with caplog.at_level(logging.WARNING):
        tracker = open_tracker(tmp_path, TrackingConfig(), {}, None, True)
        tracker.log(7, {"loss/segmentor": 0.5})
        tracker.finish(0)
    (file,) = offline_files(tmp_path)
    assert [(row["step"], row["loss/segmentor"]) for row in history(file)] == [(7, 0.5)]
    assert sum("writing offline" in record.getMessage() for record in caplog.records) == 1
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"a" * 40 not in path.read_bytes(), path


def test_a_full_queue_drops_rows_and_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(WandbRun, "_work", lambda self: None)
    monkeypatch.setattr(wandb_run, "_QUEUE_LENGTH", 5)
    run = WandbRun(tmp_path, "offline", OPTIONS, {})
    with caplog.at_level(logging.WARNING):
        for step in range(8):
            run.log(step, {"x": 1.0})
        run.finish(0)
    assert "3 rows were not sent" in caplog.text


def test_rows_that_wandb_has_already_are_not_sent_again() -> None:
    class Resumed:
        step = 40
        sent: list[int] = []  # noqa: RUF012

        def log(self, values: dict[str, Any], step: int) -> None:
            self.sent.append(step)
            self.step = step

    run = Resumed()
    for step in (20, 30, 40, 40, 50):
        wandb_run._log_row(run, step, {"loss/segmentor": 1.0})
    assert run.sent == [40, 40, 50]


def test_scores_and_pictures_made_up_after_a_restart_are_sent_with_their_own_step() -> None:
    class Resumed:
        step = 13
        sent: list[tuple[int, dict[str, Any]]] = []  # noqa: RUF012

        def log(self, values: dict[str, Any], step: int) -> None:
            self.sent.append((step, values))

    run = Resumed()
    wandb_run._log_row(run, 12, {"val/mean_iou": 0.5, "held_out/agreement": 0.6})
    wandb_run._log_row(run, 12, {"samples/a": "picture"})
    assert run.sent == [
        (13, {"step": 12, "val/mean_iou": 0.5, "held_out/agreement": 0.6}),
        (13, {"step": 12, "samples/a": "picture"}),
    ]


def test_auto_is_online_exactly_when_there_is_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_mode("auto") == choose_mode("online") == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine example.org login user password x\n")
    assert choose_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert choose_mode("auto") == choose_mode("online") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert choose_mode("auto") == "online" and choose_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "disabled" and choose_mode("offline") == "offline"


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "Disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "nonsense"}, "online"),
        ({"WANDB_MODE": "shared"}, "online"),
    ],
)
def test_the_mode_of_the_environment_counts_where_none_is_said(
    variables: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (variables | {"WANDB_API_KEY": "a" * 40}).items():
        monkeypatch.setenv(name, value)
    assert choose_mode("auto") == mode
    assert [choose_mode(said) for said in ("online", "offline")] == ["online", "offline"]


def test_the_configuration_names_a_run_before_the_environment_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("project", "entity", "group", "job_type", "tags", "name", "notes")
    run_dir = tmp_path / "voc_1"
    ours = wandb_run.naming(TrackingConfig(), run_dir)
    assert tuple(ours) == keys
    assert [ours[key] for key in keys] == ["distseg", None, None, None, [], "voc_1", None]
    variables = ("PROJECT", "ENTITY", "RUN_GROUP", "JOB_TYPE", "TAGS", "NAME", "NOTES")
    for name in variables:
        monkeypatch.setenv(f"WANDB_{name}", f"{name}, said")
    theirs = [f"{name}, said" for name in variables]
    theirs[4] = ["TAGS", "said"]  # type: ignore[call-overload]
    assert list(wandb_run.naming(TrackingConfig(), run_dir).values()) == theirs
    # also the word that is the default, where it is said
    said = TrackingConfig(project="distseg", entity="e", group="g", job_type="j", tags=["t"])
    assert list(wandb_run.naming(said, run_dir).values())[:5] == ["distseg", "e", "g", "j", ["t"]]


def test_the_id_of_a_run_is_the_files_then_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    assert wandb_run._run_id(tmp_path / "id") == "agent1"
    monkeypatch.setenv("WANDB_RUN_ID", "../../other")
    assert wandb_run._run_id(tmp_path / "id") == "agent1"
    # what is no id is no part of a path
    (tmp_path / "id").write_text("../x")
    found = wandb_run._run_id(tmp_path / "id")
    assert re.fullmatch("[0-9a-f]{8}", found) and (tmp_path / "id").read_text() == f"{found}\n"
    assert "../../other" in caplog.text and "'../x'" in caplog.text


def test_every_variable_of_wandb_is_in_the_documentation() -> None:
    (package,) = importlib.util.find_spec("wandb").submodule_search_locations  # type: ignore
    known = set(re.findall(r"\bWANDB_[A-Z_0-9]+", (Path(package) / "env.py").read_text()))
    text = (Path(__file__).parent.parent / "docs" / "wandb.md").read_text()
    named = re.findall(r"`(WANDB_[A-Z_0-9]+?)(_\*)?`", text)
    assert len(known) > 50
    missing = [
        name
        for name in known
        if not any(name == word or (star and name.startswith(word)) for word, star in named)
    ]
    assert not missing


def test_secrets_are_taken_out_of_a_nested_config() -> None:
    config = {
        "data": {"url": "https://user:pass@host/x", "paths": ["a/b", f"{SECRET}/c"]},
        "auth_token": "x",
        "num_tokens": 5,
        "seed": 3,
        "none": None,
    }
    assert without_secrets(config) == {
        "data": {"url": "https://<removed>@host/x", "paths": ["a/b", "<removed>/c"]},
        "auth_token": "<removed>",
        "num_tokens": 5,
        "seed": 3,
        "none": None,
    }


def test_a_stuck_thread_is_left_after_the_time_for_finishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WandbRun, "_work", lambda self: time.sleep(5))
    monkeypatch.setattr(wandb_run, "_FINISH_SECONDS", 0.3)
    run = WandbRun(tmp_path, "offline", OPTIONS, {})
    started = time.perf_counter()
    run.finish(0)
    assert time.perf_counter() - started < 1.5
