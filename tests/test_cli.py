"""The command line: key=value arguments anywhere, bad input as one message and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distseg.cli import build_parser, main, parse
from distseg.doctor import command
from distseg.runs import version
from shards.errors import InputError


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "toy", "--out", "x.h5", "seed=1", "num_val=2"],
        ["prepare", "toy", "seed=1", "num_val=2", "--out", "x.h5"],
        ["prepare", "--out", "x.h5", "toy", "seed=1", "num_val=2"],
    ],
)
def test_key_value_arguments_may_stand_anywhere(arguments: list[str]) -> None:
    options = parse(arguments)
    assert (
        options.name == "toy"
        and options.out == Path("x.h5")
        and options.overrides == ["seed=1", "num_val=2"]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "run", "--checkpiont=best"],
        ["pack", "x.h5", "--out", "y", "seed=1"],
        ["train", "--verbose"],
        ["predict", "run", "image.jpg", "--out", "x", "stray"],
    ],
)
def test_what_is_no_option_is_refused_by_name(
    arguments: list[str],
) -> None:
    with pytest.raises(InputError, match=arguments[-1]):
        parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "cityscape", "--out", "x.h5"], "one of: toy, stanford"),
        (["prepare", "stanford", "--out", "x.h5"], "write --root DIR"),
        (["prepare", "toy", "--out", "x.h5", "sede=1"], "seed"),
        (["pack", "missing.h5", "--out", "y"], "distseg prepare"),
        (["inspect", "https://example.org/shards"], "where they are a folder"),
        (["evaluate", "missing"], "check the path of the run"),
        (["predict", "missing", "missing.jpg", "--out", "y"], "missing.jpg does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message and "Traceback" not in message
    assert not list(tmp_path.iterdir())


def test_an_error_that_brings_an_exit_code_is_one_message_and_others_stay_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class LostError(RuntimeError):
        exit_code = 75

    def fails(options: object) -> int:
        raise error

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "_doctor", fails)
    error: Exception = LostError("rank 1 is silent")
    assert main(["doctor"]) == 75
    assert capsys.readouterr().err == "error on rank 3: rank 1 is silent\n"
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])
    # wherever a server of files may fail: it is nobody's to mend, and a launcher tries again
    error = OSError(errno.ESTALE, "Stale file handle", "picture.png")
    assert main(["doctor"]) == 75
    assert (
        "error on rank 3: [Errno 116] Stale file handle: 'picture.png'" in capsys.readouterr().err
    )
    error = FileNotFoundError(errno.ENOENT, "No such file", "picture.png")
    with pytest.raises(FileNotFoundError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["sweep", "staus", "DIR"], "did you mean status?"),
        (["train", "--steps", "5"], "write steps=5\n"),
        (["train", "--batch-size=8"], "write batch_size=8\n"),
        (["train", "--lr", "0.1"], "segmentor_optimizer.lr=0.1 or discriminator_optimizer.lr=0.1"),
        (["train", "--learning-rate", "1"], "segmentor_optimizer.lr=1"),
        (["train", "--dryrun"], "did you mean --dry-run?"),
        (["evaluate", "run", "--quik"], "did you mean --quick?"),
        (["evaluate", "run", "--shards", "other"], "did you mean data.shards=other?"),
        (["export", "run", "--format", "onxn"], "did you mean onnx?"),
        (["estimate", "preset=toy", "chip=l4"], "write --chip l4\n"),
        (["estimate", "chip=l40"], "did you mean l4?"),
        (["evaluate", "run", "checkpoint=best"], "write --checkpoint best\n"),
        (["train", "preset=toy", "dry_run=true"], "write --dry-run\n"),
        (["prepare", "stanfrod", "--out", "x.h5"], "did you mean stanford?"),
        (["models", "fcn8_vgg16"], "did you mean fcn8s_vgg16?"),
        (["train", "preset=stanfrod"], "did you mean stanford?"),
        (["train", "toy"], "write preset=toy"),
        (["train", "steps"], "write steps=VALUE"),
        (["train", "."], "write data.shards=."),
        (["train", "preset=toy", "segmentor=unet"], "choose one of them, or write your own"),
        (["train", "preset=toy", "segmentor=fcn"], "did you mean fcn"),
        (["train", "preset=toy", "segmentor=my.py"], "write my.py:NAME, with the name"),
        (["train", "preset=toy", "data.view=my.py"], "write my.py:NAME, with the name"),
        (["prepare", "my.py", "--out", "x.h5"], "write my.py:NAME, with the name"),
        (["prepare", "folder", ".", "--out", "x.h5"], "write --root ."),
        (["help", "trian"], "did you mean train?"),
        (["train", "preset=toy", "segmentor=deeplabv3_resnet"], "did you mean deeplabv3_resnet"),
        (["train", "preset=toy", "discriminator=largefov"], "did you mean large_fov?"),
        (["train", "preset=toy", "mode=supervisd"], "did you mean supervised?"),
        (["train", "preset=toy", "stps=5"], "did you mean steps?"),
        (["train", "config.yaml"], "check the path"),
        (["train", "--dry-run", "preset=toy", "crop_px=5"], "did you mean data.crop_px?"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_word_and_without_torch(
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    # None in its place makes every import of torch raise an error
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    # those of ours that have it already would not ask for it again
    for name in [name for name in sys.modules if name.endswith((".run", "dry_run"))]:
        monkeypatch.delitem(sys.modules, name)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message.splitlines(True)[-1]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [it for it in parser._actions if isinstance(it, argparse._SubParsersAction)]
    return dict(found[0].choices)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_overview_names_every_command_once_in_a_group(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(arguments) == 0
    shown = capsys.readouterr().out
    listed = [
        line.split()[0] for line in shown.split("examples")[0].splitlines() if line[:2] == "  "
    ]
    assert listed == list(subparsers(build_parser()))
    assert max(map(len, shown.splitlines())) <= 100 and "docs/quickstart.md" in shown


def test_help_is_asked_for_as_a_command_too(capsys: pytest.CaptureFixture) -> None:
    said = []
    for arguments in (["help", "pack"], ["pack", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "--samples-per-shard" in said[0]


def test_the_version_is_that_of_the_clone_with_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(version, "CLONE", tmp_path)
    (tmp_path / "pyproject.toml").write_text('version = "1.2.3"\n')
    assert version.described() == "distseg 1.2.3"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert re.fullmatch(r"distseg 1\.2\.3 \(commit [0-9a-f]{12}\)\n", capsys.readouterr().out)
