"""Terminals and locales that cannot show a name, and clones that are not installed."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distseg.cli import main
from distseg.runs import version
from distseg.tracking.catalogue import CLASS_IOU, MEAN_IOU
from distseg.tracking.progress import Progress

ROOT = Path(__file__).parent.parent
SCORES = {MEAN_IOU: 0.5, f"{CLASS_IOU}Bäume → 木": 0.25}


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "Bäume ? ?"), ("ascii", "B?ume ? ?")])
def test_a_class_name_that_a_terminal_cannot_show_ends_nothing(
    encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, "strict"))
    progress = Progress(10, 0, True)
    progress.evaluation(5, SCORES)
    progress.message("saved in läuf/木")
    # a command's own words, too
    assert main(["train", "--dry-run", "data.shards=x", "run_dir=läuf/木"]) == 0
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert shown in text and text.count("uf/?") == 2


def test_a_path_with_an_umlaut_is_itself_in_the_c_locale() -> None:
    # as in a container or a cron job whose Python is told to be no cleverer than its locale
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    look = "import sys; from shards.terminal import use_utf8; use_utf8(); "
    look += "print(sys.argv[1], sys.getfilesystemencoding())"
    command = [sys.executable, "-c", look, "run_dir=läuf"]
    done = subprocess.run(command, env=variables, capture_output=True)
    assert done.stdout == "run_dir=läuf utf-8\n".encode(), done.stderr


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distseg.cli", "train", "--help", "data"]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", os.fsdecode(b"run_dir=l\xe4uf")]) == 2
    assert r"'run_dir=l\udce4uf', bytes that are no UTF-8" in capsys.readouterr().err


def test_a_clone_that_is_not_installed_knows_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = importlib.metadata.version("distseg")
    monkeypatch.setattr(importlib.metadata, "version", missing)
    commit = version.code_version(ROOT)
    assert version.package_version() == f"{installed}+{commit}" if commit else installed
    monkeypatch.setattr(version, "CLONE", tmp_path)
    assert version.package_version() == "unknown"
