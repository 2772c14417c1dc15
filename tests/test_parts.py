"""Preparing gives the same bytes for any number of workers and after any interruption.

Bad samples are never silent.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import toy_samples

from distseg.cli import main
from shards.errors import InputError
from shards.manifest import Manifest
from shards.maps import MapsReader
from shards.pack import pack
from shards.prepare import parts, prepare
from shards.prepare.camvid import CODING
from shards.prepare.dataset import DataSet
from shards.prepare.masks import masked_sample
from shards.prepare.pairing import Pair, pair_tasks
from shards.sample import STANFORD, encode_label

YAML = """
classes: [{name: sky}, {name: tree}, {name: road}, {name: grass}, {name: water}, {name: building},
          {name: mountain}, {name: foreground}]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve images with masks, in parts of three."""
    root = tmp_path / "data"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for sample in toy_samples():
        (root / "images" / f"{sample.key}.jpg").write_bytes(sample.image)
        (root / "masks" / f"{sample.key}.png").write_bytes(encode_label(sample.label))
    (root / "distseg.yaml").write_text(YAML)
    return root


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_SAMPLES", 3)


def parts_of(out: Path) -> dict[str, int]:
    """The parts that are kept beside `out`, with the time of their last change."""
    return {
        path.name: path.stat().st_mtime_ns
        for path in (out.parent / f".{out.name}.parts").glob("[!.]*.h5")
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(
    root: Path, tmp_path: Path, workers: int
) -> None:
    prepare("folder", root, tmp_path / "alone.h5")
    prepare("folder", root, tmp_path / "together.h5", workers=workers)
    assert (tmp_path / "together.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.h5", "data", "together.h5"]


def prepare_killed(root: Path, out: Path) -> bool:
    """Prepare in a child process that is killed at its second rename.

    One part more is there than before.
    """
    child = os.fork()
    if child == 0:
        left, rename = [2], os.replace

        def replace_or_die(source: object, target: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replace_or_die
        prepare("folder", root, out)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_every_rename_it_goes_on_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.h5"
    prepare("folder", root, expected)
    out = tmp_path / "maps.h5"
    for finished in range(4):  # four parts, then the file
        assert prepare_killed(root, out) and not out.exists()
        assert len(parts_of(out)) == finished + 1
    kept = parts_of(out)
    (root / "images" / "toy_04.jpg").touch()  # another time: this part alone is made anew
    (root / "images" / "toy_11.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"toy_11\.jpg: an image that begins"):
        prepare("folder", root, out)
    again = parts_of(out)
    assert len(kept.items() & again.items()) == 2 and 2 <= len(again) <= 3
    (root / "images" / "toy_11.jpg").write_bytes(toy_samples()[11].image)
    prepare("folder", root, out)
    assert out.read_bytes() == expected.read_bytes() and not parts_of(out)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    program = f"""if __name__ == "__main__":
    from pathlib import Path
    from shards.prepare import prepare
    prepare("toy", None, Path({str(tmp_path / "toy.h5")!r}), workers=2, num_train=100000)
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        _until(lambda: parts_of(tmp_path / "toy.h5"), "a part")
        workers = [int(pid) for pid in _children(parent.pid)]
        assert len(workers) >= 2
    finally:
        parent.kill()
        parent.wait()
    _until(lambda: not any(_alive(pid) for pid in workers), "the workers to end")


def _children(pid: int) -> list[str]:
    return [
        word
        for task in Path(f"/proc/{pid}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def damage(root: Path) -> None:
    """Three bad samples of three kinds, in two parts."""
    image = root / "images" / "toy_01.jpg"
    image.write_bytes(image.read_bytes()[:500])
    (root / "masks" / "toy_02.png").write_bytes((root / "masks" / "toy_03.png").read_bytes())
    (root / "masks" / "toy_09.png").unlink()


def test_skip_bad_leaves_out_lists_and_counts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(root)
    out = tmp_path / "maps.h5"
    command = ["prepare", "folder", "--root", str(root), "--out", str(out), "seed=3"]
    assert main(command) == 2
    assert "toy_09.png" in capsys.readouterr().err
    assert main([*command, "--skip-bad", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "left out, because they are bad: 3" in said
    for key, why in (
        ("toy_01", "unreadable"),
        ("toy_02", "40 x 120 pixels for an image 48 x 48"),
        ("toy_09", "no "),
    ):
        assert f"{key}: " in said and why in said
    with MapsReader(out) as reader:
        keys = {key for split in reader.splits.values() for key in split}
        assert keys == {sample.key for sample in toy_samples()} - {"toy_01", "toy_02", "toy_09"}
        assert reader.left_out.keys() == {"toy_01", "toy_02", "toy_09"}
    assert (
        pack(out, tmp_path / "shards").left_out == Manifest.load(tmp_path / "shards").left_out == 3
    )


def test_parts_that_left_samples_out_do_not_hide_them_later(root: Path, tmp_path: Path) -> None:
    """--skip-bad that was killed, then the same without it: the bad sample is an error again."""
    damage(root)
    (root / "masks" / "toy_09.png").write_bytes((root / "masks" / "toy_08.png").read_bytes())
    out, join = tmp_path / "maps.h5", parts._join

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    parts._join = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare("folder", root, out, skip_bad=True)
    finally:
        parts._join = join
    assert len(parts_of(out)) == 4
    with pytest.raises(InputError, match="toy_0"):
        prepare("folder", root, out)
    assert len(prepare("folder", root, out, skip_bad=True).left_out) == 3


def test_a_split_of_bad_samples_only_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "train.txt").write_text("toy_00 toy_01")
    (root / "val.txt").write_text("toy_05")
    (root / "distseg.yaml").write_text(YAML + "splits: {train: train.txt, val: val.txt}\n")
    (root / "images" / "toy_05.jpg").write_text("no image")
    with pytest.raises(InputError, match="split 'val'"):
        prepare("folder", root, tmp_path / "maps.h5", skip_bad=True)
    (root / "images" / "toy_05.jpg").unlink()
    with pytest.raises(InputError, match="split 'val'"):
        prepare("folder", root, tmp_path / "maps.h5", skip_bad=True)


@pytest.mark.parametrize(  # before its size is asked for, and before it is read
    ("when", "message"),
    [("_parts", "has vanished.*the same command again"), ("check_space", ".*a readable image")],
)
def test_a_file_that_vanishes_meanwhile_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, message: str
) -> None:
    original, image = getattr(parts, when), root / "images" / "toy_05.jpg"

    def lose(*arguments: object) -> object:
        image.unlink()
        return original(*arguments)

    monkeypatch.setattr(parts, when, lose)
    with pytest.raises(InputError, match=rf"(?s){image}.*{message}"):
        prepare("folder", root, tmp_path / "maps.h5")


def test_a_part_keeps_its_identity(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"content")
    pair = Pair("a", "train", tmp_path / "a.png", tmp_path / "b.png")
    tasks = pair_tasks(tmp_path, [pair], masked_sample, coding=CODING, source="CamVid")
    # by place, although the function takes them by name: parts of before are gone on from
    arguments = (pair.image, pair.label, CODING, "CamVid")
    times = [(7, path.stat().st_mtime_ns) for path in (pair.image, pair.label)]
    digest = hashlib.sha256(repr((1, "camvid", STANFORD)).encode())
    read = "shards.prepare.masks.masked_sample"
    digest.update(repr(("a", "train", read, arguments, times)).encode())
    found = parts._identity("camvid", DataSet(STANFORD, tasks), tasks)
    assert found == digest.hexdigest()[:32]
