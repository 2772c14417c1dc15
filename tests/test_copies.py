"""Copies of checkpoints in a bucket: whole or not there, never waited for, and gone on from on a
fresh node. The bucket is a folder behind a file system of fsspec's that fails as it is told to.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import distseg
from distseg.config import loading
from distseg.runs import bucket as bucket_module
from distseg.runs import copies as copies_module
from distseg.runs.bucket import Bucket
from distseg.runs.checkpoint import find, read_best, verified
from distseg.runs.copies import Copies, fetch, write_records
from distseg.runs.sealed import seal, write_sealed
from distseg.tracking.tracker import read_metrics
from distseg.train.away import RECORDS
from distseg.train.trainer import Trainer
from shards import remote
from shards.errors import InputError, TemporaryError
from shards.manifest import sha256_of
from tests.ranks import leave_out
from tests.test_remote import needs
from tests.tiny import SETTINGS
from tests.tiny import contents as tensors

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.local import LocalFileSystem  # noqa: E402

PATIENCE_SECONDS = 60.0
STEPS = 4
# losses of evaluations decide on the learning rate: a resume needs metrics.jsonl
KEYS = SETTINGS | {
    "steps": STEPS,
    "schedule": {"name": "plateau", "plateau_patience": 1},
    "evaluate": {"num_pictures": 0, "every_steps": 2},
    "mode": "supervised",
}


CONSTANT = {"name": "constant"}


class FakeBucket(LocalFileSystem):
    """fake:///path: a folder whose calls go through `hook(call, path)` first."""

    protocol = "fake"
    hook: Callable[[str, str], None] = staticmethod(lambda call, path: None)

    def __init__(self, **options: Any):
        super().__init__(auto_mkdir=True, **options)

    def put_file(self, lpath: str, rpath: str, *rest: Any, **options: Any) -> None:
        # as on a file system: one that is killed in it leaves half of a file
        half = Path(lpath).read_bytes()[: Path(lpath).stat().st_size // 2]
        super().pipe_file(rpath, half)
        type(self).hook("put", rpath)
        super().put_file(lpath, rpath, *rest, **options)

    def pipe_file(self, path: str, value: bytes, *rest: Any, **options: Any) -> None:
        super().pipe_file(path, value[: len(value) // 2])
        type(self).hook("write", path)
        super().pipe_file(path, value, *rest, **options)

    def mv(self, path: str, *rest: Any, **options: Any) -> None:
        type(self).hook("move", path)
        super().mv(path, *rest, **options)

    def cat_file(self, path: str, *rest: Any, **options: Any) -> bytes:
        type(self).hook("read", path)
        return super().cat_file(path, *rest, **options)

    def ls(self, path: str, *rest: Any, **options: Any) -> Any:
        type(self).hook("list", path)
        return super().ls(path, *rest, **options)

    def rm(self, path: str, *rest: Any, **options: Any) -> None:
        type(self).hook("remove", path)
        # a folder is no one thing in a bucket: one by one, the file that makes it whole last
        for file in sorted(Path(self._strip_protocol(path)).glob("*")):
            if file.is_file():
                type(self).hook("remove", str(file))
                file.unlink()
        super().rm(path, *rest, **options)


@pytest.fixture(scope="module", autouse=True)
def bare_runs() -> Iterator[None]:
    fsspec.register_implementation("fake", FakeBucket, clobber=True)
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "PAUSES", (0.001, 0.001))
    monkeypatch.setattr(copies_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(FakeBucket, "hook", staticmethod(lambda call, path: None))


def train(shards: Path, run_dir: Path, bucket: Path | None = None, **keys: Any) -> Any:
    overrides = [f"data.shards={shards}", f"run_dir={run_dir}", "checkpoint.every_steps=1"]
    overrides += ["data.labelled=1/2"]
    if bucket is not None:
        overrides.append(f"checkpoint.copy_to=fake://{bucket}")
    return distseg.fit(overrides, **KEYS | keys)


@pytest.fixture(scope="module")
def finished(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, and is copied nowhere."""
    return train(toy_shards, tmp_path_factory.mktemp("copies") / "run").run_dir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two small checkpoints, of STEPS - 1 and STEPS, and what goes along."""
    run = tmp_path / "run"
    add_checkpoint(run, STEPS - 1)
    add_checkpoint(run, STEPS)
    (run / "config.yaml").write_text("steps: 4\n")
    rows = [{"step": step, "loss/segmentor": 1.0} for step in range(1, STEPS + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "attempts.jsonl").write_text('{"event": "start"}\n')
    return run


def add_checkpoint(run: Path, step: int) -> None:
    """As published: several files, of one tensor each."""
    folder, sums = run / f"checkpoints/step-{step:08d}", {}
    folder.mkdir(parents=True)
    for part in ("network", "optimizer", "counters"):
        name = f"segmentor.{part}.safetensors"
        save_file({"x": torch.full((9,), float(step))}, folder / name)
        sums[name] = sha256_of(folder / name)
    parts = {"segmentor": ["network", "optimizer", "counters"]}
    content = {"version": 1, "state": {"step": step}, "identity": {}, "parts": parts}
    (folder / "state.json").write_bytes(seal(content | {"files": sums}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


def opened(place: Path) -> Bucket:
    return Bucket(f"fake://{place}")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def copied_in_turn(run: Path, place: Path) -> None:
    """Both of its checkpoints, as they were written: one is copied, then the next."""
    older = shutil.copytree(run, run.with_name("older"))
    without(older, STEPS)
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (older / "metrics.jsonl").write_text("".join(lines[:-1]))
    copied(older, place)
    copied(run, place)


def copied(run: Path, place: Path, seconds: float = PATIENCE_SECONDS, **keys: Any) -> list[str]:
    """Copy all of a run; what was said."""
    said: list[str] = []
    Copies(run, opened(place), keys.pop("keep_last", 2), RECORDS, **keys).finish(
        seconds, said.append
    )
    return said


def without(run: Path, step: int) -> None:
    shutil.rmtree(run / f"checkpoints/step-{step:08d}")


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((folder / "checkpoints").glob("step-*"))]


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    timed = ("time", "seconds", "images_per_second", "peak_share", "ranks/", "data_wait", "memory")
    timed += ("checkpoint/", "health/", "sections/")
    found = read_metrics(run / "metrics.jsonl")
    return [{k: row[k] for k in row if not any(word in k for word in timed)} for row in found]


class Lost(Exception):
    """The node is gone."""


def test_a_fresh_node_goes_on_to_the_bits_of_a_run_that_was_never_stopped(
    toy_shards: Path,
    finished: Path,
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    step, is_lost = Trainer.train_step, True
    whole = place / "checkpoints/step-00000002/state.json"

    def lost_after_two(self: Trainer, batch: Any) -> Any:
        if is_lost and self.state.step == 2:
            until(whole.is_file)
            raise Lost
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", lost_after_two)
    with pytest.raises(Lost):
        train(toy_shards, tmp_path / "lost", place)
    is_lost = False
    fresh = train(toy_shards, tmp_path / "fresh", place).run_dir
    assert f"fetched step 2 from fake://{place}" in capsys.readouterr().out
    for folder in (fresh, place):
        # `lost` is not asked for anything; what lies in the bucket is a run directory
        assert steps(folder)[-1] == STEPS
        last = f"checkpoints/step-{STEPS:08d}"
        assert tensors(folder / last) == tensors(finished / last)
        assert rows(folder) == rows(finished)
        for name in ("labelled.txt", "checkpoints/best.json"):
            assert (folder / name).read_bytes() == (finished / name).read_bytes()
    assert distseg.load(place, "best").step == read_best(finished / "checkpoints")["step"]
    # what the lost node could no longer copy is how it ended
    lines = (fresh / "attempts.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert [event for event in events if event != "mark"] == ["start", "start", "end"]


class Killed(BaseException):
    """Ends the thread where it is, as a kill ends a process."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_at_any_call_it_leaves_the_older_or_the_newer_checkpoint_whole(
    run: Path, place: Path, tmp_path: Path
) -> None:
    copied_in_turn(run, place)
    without(place, STEPS)
    shutil.copy(tmp_path / "older/metrics.jsonl", place)
    start = shutil.copytree(place, tmp_path / "start")
    ended, found = threading.Event(), []
    for deadly in range(1000):
        calls = 0

        def kill(call: str, path: str, deadly: int = deadly) -> None:
            nonlocal calls
            calls += 1
            if calls > deadly:
                ended.set()
                raise Killed

        shutil.rmtree(place)
        shutil.copytree(start, place)
        FakeBucket.hook = staticmethod(kill)
        copies = Copies(run, opened(place), 1, RECORDS)
        copies.ask()
        until(lambda c=copies: ended.is_set() or c._done == c._num_asked)
        copies.close()
        FakeBucket.hook = staticmethod(lambda call, path: None)
        node = tmp_path / f"node-{deadly}"
        came = fetch(node, opened(place), RECORDS)
        found += steps(node)
        # whatever came is sound, nothing is passed over, and its steps are in the records
        assert len(came.paths) == 1 and not came.damaged and not came.lines[1:]
        for step in steps_whole(place):
            verified(place / f"checkpoints/step-{step:08d}")
        assert read_metrics_of(came.records)[-1]["step"] >= found[-1]
        if not ended.is_set():
            break
        ended.clear()
    # many calls, the older one up to the last file, the newer one from then on
    assert deadly > 15 and {*found} == {STEPS - 1, STEPS} and found == sorted(found)
    assert steps(place) == [STEPS]


def read_metrics_of(records: dict[str, bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in records["metrics.jsonl"].splitlines()]


def test_what_a_kill_has_left_is_cleared_away_by_the_next_copy(run: Path, place: Path) -> None:
    half = place / "checkpoints/step-00000001"
    half.mkdir(parents=True)
    (half / "segmentor.network.safetensors").write_bytes(b"half")
    copied(run, place)
    # the newest goes first, and alone: those before it were the older copies' matter
    without(run, STEPS - 1)
    assert files(place) == files(run)


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(
    toy_shards: Path, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [""]

    def refuse(call: str, path: str) -> None:
        if call in refused:
            raise PermissionError("Access Denied")

    monkeypatch.setattr(Trainer, "train_step", None)
    monkeypatch.setattr(FakeBucket, "hook", staticmethod(refuse))
    for refused[0] in ("write", "list", "read", "remove"):
        with pytest.raises(InputError, match=r"checkpoint\.copy_to: fake://.*Access Denied"):
            opened(place).check()
    with pytest.raises(InputError, match=r"leave out checkpoint\.copy_to"):
        train(toy_shards, tmp_path / "run", place)
    assert [*files(tmp_path / "run")] == ["lock"]


def test_a_place_that_does_not_answer_is_asked_again_and_then_named(place: Path) -> None:
    calls = []

    def fail(call: str, path: str) -> None:
        calls.append(call)
        if len(calls) < limit:
            raise ConnectionResetError("gone https://host/x?sig=hunter2")

    FakeBucket.hook = staticmethod(fail)
    limit = 3
    opened(place).write("name", b"content")
    assert calls == ["write"] * 3 + ["move"] and (place / "name").read_bytes() == b"content"
    limit = 999
    with pytest.raises(TemporaryError, match=r"ConnectionResetError.*3 times in a row") as caught:
        opened(place).read("name")
    assert "hunter2" not in str(caught.value)


def test_a_start_waits_for_a_place_that_hangs_no_longer_than_its_limit(
    toy_shards: Path, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def hang(call: str, path: str) -> None:
        assert call != "read" or gate.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(bucket_module, "HUNG_SECONDS", 0.2)
    monkeypatch.setattr(Trainer, "train_step", None)
    monkeypatch.setattr(FakeBucket, "hook", staticmethod(hang))
    with pytest.raises(TemporaryError, match=r"fake://.*config\.yaml: no answer for 0 s; the"):
        train(toy_shards, tmp_path / "run", place)
    gate.set()


def test_a_fetch_may_take_long_for_as_long_as_bytes_come(
    run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(run, place)
    limit, stops, gate = 0.4, False, threading.Event()

    def slowly(self: FakeBucket, rpath: str, lpath: str, *rest: Any, **options: Any) -> None:
        content = Path(self._strip_protocol(rpath)).read_bytes()
        is_long = rpath.endswith("segmentor.network.safetensors")
        size = -(-len(content) // (6 if is_long else 1))
        with Path(lpath).open("wb", buffering=0) as file:
            for start in range(0, len(content), size):
                if stops and start:
                    assert gate.wait(PATIENCE_SECONDS)
                time.sleep(limit / 4 if is_long else 0)
                file.write(content[start : start + size])

    monkeypatch.setattr(bucket_module, "HUNG_SECONDS", limit)
    monkeypatch.setattr(FakeBucket, "get_file", slowly)
    fetch(tmp_path / "node", opened(place), RECORDS)
    assert steps(tmp_path / "node") == [STEPS]
    stops = True
    with pytest.raises(TemporaryError, match=r"safetensors: no progress for 0 s"):
        fetch(tmp_path / "other", opened(place), RECORDS)
    gate.set()
    assert steps(tmp_path / "other") == []


def test_a_place_that_refuses_later_ends_nothing_and_is_told_once_and_in_the_health(
    toy_shards: Path,
    finished: Path,
    tmp_path: Path,
    place: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = threading.Event()

    def refuse(call: str, path: str) -> None:
        if call == "put":
            refused.set()
            raise PermissionError("no room left for you")

    step = Trainer.train_step

    def after_a_refusal(self: Trainer, batch: Any) -> Any:
        # the second step is logged when the first has been refused
        until(lambda: self.state.step < 1 or (refused.is_set() and bool(self.copies.num_failures)))
        return step(self, batch)

    monkeypatch.setattr(FakeBucket, "hook", staticmethod(refuse))
    monkeypatch.setattr(Trainer, "train_step", after_a_refusal)
    run = train(toy_shards, tmp_path / "run", place, checkpoint={"copy_wait_seconds": 0.05}).run_dir
    said = capsys.readouterr().out
    assert said.count("no room left for you") == 1 and "Training goes on" in said
    assert "health: checkpoints are not copied, since step 2" in said
    assert "no checkpoint is whole there. The same command copies the rest" in said
    last = f"checkpoints/step-{STEPS:08d}"
    assert tensors(run / last) == tensors(finished / last) and not steps_whole(place)
    FakeBucket.hook = staticmethod(lambda call, path: None)
    assert not copied(run, place)
    assert steps_whole(place)[-1] == STEPS and tensors(place / last) == tensors(finished / last)


def steps_whole(place: Path) -> list[int]:
    return [
        step
        for step in steps(place)
        if (place / f"checkpoints/step-{step:08d}/state.json").is_file()
    ]


def test_a_slow_place_holds_no_step_and_the_newest_goes_first(
    toy_shards: Path,
    tmp_path: Path,
    place: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_last, blocked, puts = threading.Event(), threading.Event(), []

    def wait(call: str, path: str) -> None:
        if call == "put":
            puts.append(int(re.search(r"step-(\d{8})", path)[1]))  # type: ignore[index]
            blocked.set()
            # a training that waited for this would never come to its last step
            assert is_last.wait(PATIENCE_SECONDS)

    step = Trainer.train_step

    def tell(self: Trainer, batch: Any) -> Any:
        if self.state.step == 1:
            assert blocked.wait(PATIENCE_SECONDS)
        if self.state.step == STEPS - 1:
            assert {*puts} == {1} and not steps_whole(place)
            until((tmp_path / "run/checkpoints/step-00000003").is_dir)
            is_last.set()
        return step(self, batch)

    monkeypatch.setattr(FakeBucket, "hook", staticmethod(wait))
    monkeypatch.setattr(Trainer, "train_step", tell)
    # no evaluation in between, whose step would be copied as the best
    train(toy_shards, tmp_path / "run", place, evaluate={"num_pictures": 0}, schedule=CONSTANT)
    assert is_last.is_set() and puts == sorted(puts)
    assert 2 not in puts, "a newer one was there when the first was done"
    assert re.search(r"copies: \d checkpoints? up to step \d left out", capsys.readouterr().out)
    assert steps_whole(place)[-1] == STEPS


def test_a_connection_that_breaks_at_each_file_gets_a_checkpoint_there(
    run: Path, place: Path
) -> None:
    puts: list[str] = []

    def breaks(call: str, path: str) -> None:
        if call == "put":
            puts.append(path)
            # each turn gets one file there: the next one's requests all fail
            if len(puts) % 4 != 1:
                raise ConnectionResetError

    FakeBucket.hook = staticmethod(breaks)
    said = copied(run, place)
    assert steps_whole(place) == [STEPS] and verified(place / f"checkpoints/step-{STEPS:08d}")
    assert "ConnectionResetError" in said[0] and said[-1].endswith("takes them again")
    assert len([path for path in puts if "counters" in path]) == 1


def test_the_end_waits_no_longer_than_it_is_told_to(run: Path, place: Path) -> None:
    gate = threading.Event()

    def hang(call: str, path: str) -> None:
        assert call != "put" or gate.wait(PATIENCE_SECONDS)

    FakeBucket.hook = staticmethod(hang)
    (said,) = copied(run, place, seconds=0.05)
    assert re.search(r"not all was copied to fake://.* within 0 s .*no checkpoint is whole", said)
    gate.set()
    # it was told to end: it stops at the next file, and a new start finds it incomplete
    time.sleep(0.05)
    assert not steps_whole(place)


def test_of_run_dir_and_bucket_the_newer_one_counts(run: Path, place: Path, tmp_path: Path) -> None:
    copied_in_turn(run, place)
    older = tmp_path / "older"
    came = fetch(older, opened(place), RECORDS)
    assert steps(older)[-1] == STEPS and came.records["metrics.jsonl"]
    newer = shutil.copytree(run, tmp_path / "newer")
    without(newer, STEPS - 1)
    shutil.rmtree(place / f"checkpoints/step-{STEPS:08d}")
    before = files(newer)
    assert not fetch(newer, opened(place), RECORDS).paths and files(newer) == before
    copied(newer, place)
    assert steps_whole(place) == [STEPS - 1, STEPS]


def test_the_best_is_copied_and_fetched_and_named_only_where_it_is(
    run: Path, place: Path, tmp_path: Path
) -> None:
    add_checkpoint(run, 1)
    write_sealed(run / "checkpoints/best.json", {"step": 1, "mean_iou": 0.5})
    copied(run, place, keep_last=1)
    assert steps(place) == [1, STEPS]
    fetch_all(tmp_path / "node", place)
    assert steps(tmp_path / "node") == [1, STEPS]
    assert find(tmp_path / "node", "best").name == "step-00000001"
    without(place, 1)
    fetch_all(tmp_path / "other", place)
    assert read_best(tmp_path / "other/checkpoints") == {} and steps(tmp_path / "other") == [STEPS]


def test_a_fetch_that_is_broken_off_leaves_nothing_and_one_that_was_killed_is_completed(
    run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(run, 1)
    write_sealed(run / "checkpoints/best.json", {"step": 1, "mean_iou": 0.5})
    copied(run, place, keep_last=1)
    node = tmp_path / "node"

    def refuse(call: str, path: str) -> None:
        if call == "read" and path.endswith("metrics.jsonl"):
            raise PermissionError("not for you")

    with monkeypatch.context() as patch:
        patch.setattr(FakeBucket, "hook", staticmethod(refuse))
        with pytest.raises(InputError, match="not for you"):
            fetch(node, opened(place), RECORDS)
    assert steps(node) == []
    # killed when the newest had come: its records are in memory until the run is accepted
    fetch(node, opened(place), RECORDS)
    without(node, 1)
    fetch_all(node, place)
    assert steps(node) == [1, STEPS] and read_best(node / "checkpoints")["step"] == 1
    for name in ("metrics.jsonl", "attempts.jsonl"):
        assert (node / name).read_bytes() == (run / name).read_bytes()


def test_a_copy_later_than_where_a_damaged_run_went_on_from_stays(run: Path, place: Path) -> None:
    copied_in_turn(run, place)
    without(run, STEPS)
    copied(run, place, keep_last=1)
    assert steps_whole(place) == [STEPS - 1, STEPS]


def fetch_all(node: Path, place: Path) -> None:
    write_records(node, fetch(node, opened(place), RECORDS).records)


def test_a_damaged_copy_is_passed_over_told_and_made_anew(
    run: Path, place: Path, tmp_path: Path
) -> None:
    copied_in_turn(run, place)
    before = files(place)
    spoilt = place / f"checkpoints/step-{STEPS:08d}/segmentor.network.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    came = fetch(tmp_path / "node", opened(place), RECORDS)
    assert steps(tmp_path / "node") == [STEPS - 1]
    assert f"fake://{place}/checkpoints/step-{STEPS:08d}: segmentor.network" in came.lines[0]
    copied(run, place)
    assert files(place) != before, "what is there under the same name is not looked into"
    copied(run, place, damaged=came.damaged)
    assert files(place) == before


def test_another_runs_place_is_refused_and_nothing_changes(
    toy_shards: Path, finished: Path, place: Path, tmp_path: Path
) -> None:
    copied(finished, place)
    before = files(place)
    with pytest.raises(InputError, match=r"fake://.*another configuration \(seed: 0 there, 1 now"):
        train(toy_shards, tmp_path / "other", place, seed=1)
    # as `batch_size` or other data would be: what came goes again
    listed = (place / "labelled.txt").read_text().splitlines()
    toy = [f"toy_{number:02d}" for number in range(8)]
    (place / "labelled.txt").write_text("\n".join(key for key in toy if key not in listed) + "\n")
    with pytest.raises(InputError, match="labelled_sha256 is"):
        train(toy_shards, tmp_path / "node", place)
    assert [*files(tmp_path / "node")] == ["lock"] and not steps(tmp_path / "node")
    assert {**files(place), "labelled.txt": b""} == {**before, "labelled.txt": b""}


@pytest.mark.parametrize(
    "url", ["/mnt/disk", "http://host/x", "s3://", "s3:///x", "s3://me:hunter2@host/x", "://x"]
)
def test_a_url_that_cannot_be_one_is_refused_with_the_configuration(url: str) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.copy_to") as caught:
        loading.load(["preset=toy", f"checkpoint.copy_to={url}"])
    assert "hunter2" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PACKAGES", {"s3": ("no_such_module", "s3")})
    with pytest.raises(InputError, match=r"without the package no_such_module(.|\n)*\[s3\]"):
        Bucket("s3://bucket/run")
    with pytest.raises(InputError, match="nosuch"):
        Bucket("nosuch://bucket/run")


def test_s3_takes_a_run_prunes_it_and_gives_it_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("s3fs", "moto", "flask", "flask_cors")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for key, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "hunter2"}.items():
            monkeypatch.setenv(f"AWS_{key}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(InputError, match=r"checkpoint\.copy_to: s3://copies/run"):
            Bucket("s3://copies/run").check()
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="copies")
        bucket = Bucket("s3://copies/run")
        bucket.check()
        Copies(run, bucket, 2, RECORDS).finish(PATIENCE_SECONDS, pytest.fail)
        add_checkpoint(run, STEPS + 1)
        for keep_last in (2, 1):
            Copies(run, bucket, keep_last, RECORDS).finish(PATIENCE_SECONDS, pytest.fail)
            there = [f"step-{step:08d}" for step in (STEPS, STEPS + 1)[-keep_last:]]
            assert bucket.names("checkpoints") == there
        assert {*bucket.names("")} == {"checkpoints"} | ({*RECORDS} & files(run).keys())
        came = fetch(tmp_path / "node", bucket, RECORDS)
        assert came.records == {name: (run / name).read_bytes() for name in came.records}
        last = f"checkpoints/step-{STEPS + 1:08d}"
        assert files(tmp_path / "node" / last) == files(run / last)
    finally:
        server.stop()
