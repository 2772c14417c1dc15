"""What is handed on: the wheel and what is in it, the image's files, and one version."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="the wheel is built with it")

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = ("distseg", "shards", "launchers")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def version() -> str:
    found = re.search(r'^version = "(\d+\.\d+\.\d+)"$', PROJECT, re.M)
    assert found is not None
    return found[1]


def test_the_version_stands_in_one_place_and_the_others_follow() -> None:
    assert f"\nversion: {version()}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    # what is in a version is under its heading; what is not yet in one, above all others
    released = headings[1:] if headings[0] == "Unreleased" else headings
    for heading in released:
        assert re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading), heading
    if headings[0] != "Unreleased":
        assert headings[0].split()[0] == version()
    for path in ("README.md", "docs/comparison.md"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"\| distseg (\| )?{re.escape(version())} \|", text), path


def test_the_wheel_holds_all_that_is_used_when_it_is_installed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"distseg-{version()}-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / f"distseg-{version()}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        entries = wheel.read(f"distseg-{version()}.dist-info/entry_points.txt").decode()
    assert "distseg = distseg.cli:main" in entries
    files = {
        str(path.relative_to(source))
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    assert {name for name in names if ".dist-info/" not in name} == files


def test_what_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        word for line in re.findall(r"^COPY (.*) \S+$", docker, re.M) for word in line.split()
    }
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    apptainer = (ROOT / "slurm/distseg.def").read_text(encoding="utf-8")
    files = apptainer.split("%files\n")[1].split("\n\n")[0]
    assert {line.split()[0] for line in files.splitlines()} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_both_images_take_the_torch_that_the_project_asks_for() -> None:
    wanted = re.search(r'^    "(torch>=.*)",$', PROJECT, re.M)
    assert wanted is not None
    for path in ("Dockerfile", "slurm/distseg.def"):
        assert f'"{wanted[1]}"' in (ROOT / path).read_text(encoding="utf-8"), path
