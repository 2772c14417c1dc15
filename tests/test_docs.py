"""What README, CONTRIBUTING and docs/ name is there: files, modules, keys."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from distseg.config.names import OLD_NAMES, SECTIONS, find, full_name
from tests.test_imports import ROOMS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FOLDERS = r"(?:distseg|shards|launchers|examples|tests|docs|benchmarks|slurm)"


def tree(package: str) -> str:
    """The lines of the tree in how_it_works.md that are of one package."""
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    found = re.search(rf"^    {package}/ .*\n(?:     +.*\n)*", text, re.M)
    assert found is not None
    return found[0]


def test_the_tree_is_the_file_system() -> None:
    entries = re.findall(r"^      (\S+)", tree("distseg"), re.M)
    rooms = [entry.rstrip("/") for entry in entries if (ROOT / "distseg" / entry).is_dir()]
    assert rooms == [*ROOMS, "presets"]
    modules = {path.name for path in (ROOT / "distseg").glob("*.py")} - {"__init__.py"}
    assert modules == {entry for entry in entries if entry.endswith(".py")}


@pytest.mark.parametrize("package", ["distseg", "shards", "launchers"])
def test_every_file_of_the_tree_is_in_its_folder(package: str) -> None:
    folder = ROOT / package
    for line in tree(package).splitlines():
        entry = re.match(r"      (\w+)/", line)
        folder = ROOT / package / entry[1] if entry else folder
        for name in re.findall(r"\w+\.py", line):
            assert (folder / name).is_file() or (ROOT / package / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.]){FOLDERS}/[\w/.]*\w", text):
        assert (ROOT / path).exists() or not Path(path).suffix, path


def anchors(text: str) -> set[str]:
    """The names that a repository browser gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # the text of a picture may be broken over lines
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_a_page_sets_is_one_by_its_present_name(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    keys = set(re.findall(rf"(?<![\w./])((?:{'|'.join(SECTIONS)})\.[\w.]+)=", text))
    for command in re.findall(r"distseg[ .](?:train|evaluate) (.*)", text.replace("\\\n", "")):
        keys |= set(re.findall(r"(?<=[ \[])([a-z_]+)=", f" {command}"))
    # what stands for any of them
    for key in keys - {"key"}:
        assert key not in OLD_NAMES and find(full_name(key)) is not None, key


def test_a_newcomer_can_finish_the_readme() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_the_reference_of_commands_is_what_the_parsers_say() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs/cli_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.page()


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.stem == "index" or path.stem in index, path
