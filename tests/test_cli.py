"""The command line: key=value arguments anywhere, bad input as one message and an exit code."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from distseg.cli import main, parse
from distseg.doctor import command
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
