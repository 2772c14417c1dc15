"""References to code of the user's own: what they give, and one clear error for each bad one."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from distseg.config import code, loading
from distseg.train import replicas
from shards import user_code
from shards.errors import InputError
from shards.neighbours import neighbours

NETWORK = """
import sys
from sibling import FACTOR
PATH = list(sys.path)
NUMBER = 3
class Net:
    def __init__(self, num_classes, width=4):
        self.size = num_classes * width * FACTOR
def later():
    import lazy
    return lazy.VALUE
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "sibling.py").write_text("FACTOR = 10\n")
    (tmp_path / "lazy.py").write_text("VALUE = 7\n")
    return tmp_path


@pytest.fixture(autouse=True)
def path_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("sibling", "lazy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def refused(reference: str, message: str) -> str:
    with pytest.raises(InputError, match=message) as caught:
        user_code.load(reference, "segmentor")
    assert reference in caught.value.got and "segmentor=" in caught.value.got
    return str(caught.value)


def test_a_file_gives_the_object_its_path_and_its_sha256(folder: Path) -> None:
    loaded = user_code.load(f"{folder}/net.py:Net", "segmentor")
    assert loaded.value(2, width=3).size == 60
    assert loaded.path == folder / "net.py"
    assert loaded.sha256 == hashlib.sha256(NETWORK.encode()).hexdigest()
    # once: what was made of it before is still of its class
    assert user_code.load(f"{folder}/net.py:Net", "segmentor").value is loaded.value


def test_a_files_folder_is_searched_first_while_it_is_imported_and_last_later(folder: Path) -> None:
    later = user_code.load(f"{folder}/net.py:later", "segmentor").value
    assert later.__globals__["PATH"][0] == str(folder)
    assert sys.path[0] != str(folder) and sys.path[-1] == str(folder)
    assert later() == 7


def test_two_files_of_one_name_do_not_meet(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "net.py").write_text("def Net(): return 'other'\n")
    first = user_code.load(f"{folder}/net.py:Net", "segmentor").value
    second = user_code.load(f"{folder}/other/net.py:Net", "segmentor").value
    assert first(1).size == 40 and second() == "other"
    assert first.__module__ != second.__module__ and first.__module__ in sys.modules


def test_a_relative_path_starts_in_the_current_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert user_code.absolute("net.py:Net") == f"{folder}/net.py:Net"
    assert user_code.absolute("my_package.net:Net") == "my_package.net:Net"
    assert user_code.load("net.py:Net", "segmentor").path == folder / "net.py"
    assert user_code.short(f"{folder}/net.py:Net") == "net.py:Net"


def test_a_module_is_found_from_the_current_directory_and_names_the_file_that_defines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folder / "my_package_of_doors"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from my_package_of_doors.inner.net import Net\n")
    (package / "inner" / "net.py").write_text("class Net: pass\n")
    monkeypatch.chdir(folder)
    for reference in ("my_package_of_doors:Net", "my_package_of_doors.inner.net:Net"):
        loaded = user_code.load(reference, "segmentor")
        assert loaded.path == package / "inner" / "net.py"
        assert loaded.sha256 == hashlib.sha256(b"class Net: pass\n").hexdigest()


def test_a_changed_file_is_imported_anew(folder: Path) -> None:
    reference = f"{folder}/net.py:Net"
    before = user_code.load(reference, "segmentor")
    (folder / "net.py").write_text(NETWORK.replace("width=4", "width=5"))
    after = user_code.load(reference, "segmentor")
    assert (before.value(1).size, after.value(1).size) == (40, 50)
    assert before.sha256 != after.sha256


def size_of(net: object) -> int:
    return net.size  # type: ignore[attr-defined]


def begin(_: object) -> None:
    pass


def test_worker_processes_know_its_objects(folder: Path) -> None:
    net = user_code.load(f"{folder}/net.py:Net", "segmentor").value(3)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, begin, (user_code.ImportedFiles(),)) as pool:
        assert pool.submit(size_of, net).result() == 120
    # what does it: a new process that has not imported the file does not know them
    text = f"import pickle, sys; pickle.loads({pickle.dumps(net)!r})"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode and "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(
    "reference", ["net.py:", ":Net", "a b:Net", "net.py:Net()", "a/b:Net", "a..b:Net"]
)
def test_another_form_is_refused(reference: str) -> None:
    assert "path/to/file.py:name" in refused(reference, "segmentor=")


def test_what_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert str(folder) in refused("nett.py:Net", "no file .*nett.py")
    refused("no_such_package.net:Net", "no module no_such_package")
    refused("sibling.net:Net", "no module sibling.net")
    assert "did you mean Net?" in refused("net.py:Nett", "no Nett in net.py")
    refused("net.py:NUMBER", "NUMBER is of type int")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef f(:\n", r"SyntaxError: .*bad.py, line 2"),
        ("\n\nx = 1 / 0\n", r"ZeroDivisionError: division by zero .*bad.py, line 3"),
        ("import no_such_module\n", r"ModuleNotFoundError: .*no_such_module.*bad.py, line 1"),
        ("import sys\nsys.exit('usage: bad')\n", r"SystemExit: usage: bad .*bad.py, line 2"),
        ("x = '\x00'\n", r"SyntaxError|ValueError"),
    ],
)
def test_an_import_that_fails_is_told_with_its_line(
    folder: Path, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "bad.py").write_text(source)
    refused(f"{folder}/bad.py:f", message)
    assert user_code.module_name(folder / "bad.py") not in sys.modules
    if "\x00" not in source:
        monkeypatch.chdir(folder)
        monkeypatch.delitem(sys.modules, "bad", raising=False)  # of another test
        refused("bad:f", message)
        monkeypatch.delitem(sys.modules, "bad", raising=False)


def test_nothing_is_taken_from_a_run_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "inside").mkdir()
    (run / "config.yaml").write_text("")
    trap = f"open({str(folder / 'ran')!r}, 'w')\ndef Net(num_classes): pass\n"
    for place in ("evil.py", "evil_module.py", "inside/__init__.py", "inside/net.py"):
        (run / place).write_text(trap)
    (folder / "link.py").symlink_to(run / "evil.py")
    (folder / "linked").symlink_to(run)
    for path in ("run/evil.py", "run/inside/net.py", "link.py", "linked/evil.py"):
        refused(f"{folder}/{path}:Net", "lies in the run directory")
    monkeypatch.chdir(run)
    refused("evil_module:Net", "no module evil_module")
    refused("inside.net:Net", "no module inside")
    monkeypatch.syspath_prepend(str(run))
    refused("evil_module:Net", "lies in the run directory")
    refused("inside.net:Net", "lies in the run directory")
    assert not (folder / "ran").exists()


def test_a_call_is_refused_for_what_it_does_not_take_or_needs(folder: Path) -> None:
    (folder / "calls.py").write_text(
        "def net(num_classes, width, depth=2): raise KeyError('depth')\n"
        "def other(classes, **rest): pass\n"
    )

    def make(name: str, **options: object) -> None:
        code = user_code.load(f"{folder}/calls.py:{name}", "segmentor")
        user_code.call(code, "segmentor", options, "segmentor.options", num_classes=2)

    with pytest.raises(InputError, match="other does not take num_classes"):
        make("other", classes=2)
    with pytest.raises(InputError, match=r"segmentor.options.wide, .*\n.*among: width, depth"):
        make("net", wide=1)
    with pytest.raises(InputError, match=r"without width\n(.*\n)?.*segmentor.options.width="):
        make("net", depth=1)
    with pytest.raises(InputError, match=r"KeyError: 'depth' .*calls.py, line 1"):
        make("net", width=1)


@pytest.mark.parametrize("what", ["raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_what_leaves_the_program_is_an_error_of_the_file(what: str, tmp_path: Path) -> None:
    at_import, in_call = tmp_path / "leaves.py", tmp_path / "net.py"
    at_import.write_text(f"class Net: pass\n{what}\n")
    refused(f"{at_import}:Net", r"leaves.py, line 2\)")
    in_call.write_text(f"def net(num_classes):\n    {what}\n")
    loaded = user_code.load(f"{in_call}:net", "segmentor")
    with pytest.raises(InputError, match=r"net.py, line 2\)"):
        user_code.call(loaded, "segmentor", {}, "segmentor.options", num_classes=3)


def test_a_signal_that_interrupts_code_of_the_users_own_stays_one(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import os, signal\ndef net(num_classes):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while True: pass\n"
    )
    loaded = user_code.load(f"{tmp_path}/net.py:net", "segmentor")
    with pytest.raises(KeyboardInterrupt):
        user_code.call(loaded, "segmentor", {}, "segmentor.options", num_classes=3)


def test_files_that_a_file_imports_are_its_neighbours(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "own_parts").mkdir(parents=True)
    (folder / "net.py").write_text(
        "import json\nimport pytest\nfrom own_width import WIDTH\nimport own_parts.blocks\n"
        "from shards.sample import Sample\nclass Net: pass\n"
    )
    (folder / "own_width.py").write_text("WIDTH = 3\n")
    (folder / "unused.py").write_text("")
    (folder / "own_parts" / "__init__.py").write_text("")
    (folder / "own_parts" / "blocks.py").write_text("from . import deep\n")
    (folder / "own_parts" / "deep.py").write_text("DEPTH = 2\n")
    found = neighbours(user_code.load(f"{folder}/net.py:Net", "segmentor"))
    in_package = [f"own_parts/{name}.py" for name in ("__init__", "blocks", "deep")]
    assert list(found) == [*in_package, "own_width.py"]
    assert found["own_width.py"] == hashlib.sha256(b"WIDTH = 3\n").hexdigest()


def test_what_a_file_imports_is_recorded_and_compared(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from other_width import WIDTH\nclass Net: pass\n")
    (tmp_path / "other_width.py").write_text("WIDTH = 3\n")
    config = loading.load(["data.shards=x", f"segmentor={tmp_path}/net.py:Net"])
    before = code.recorded(config)
    assert set(before.code) == {"segmentor", "segmentor:other_width.py"}
    code.check_unchanged(before, code.recorded(config))
    (tmp_path / "other_width.py").write_text("WIDTH = 4\n")
    with pytest.raises(InputError, match=r"net\.py:Net imports other_width\.py: the file has"):
        code.check_unchanged(before, code.recorded(config))


def test_ranks_with_other_files_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    config = loading.load(["data.shards=x", "segmentor=net.py:Net"])
    config.code = {"segmentor": "a"}
    answers = [("host0", {"segmentor": "a"}), ("host1", {"segmentor": "b"})]
    monkeypatch.setattr(replicas, "of_all", lambda ranks, own, work: work(answers))
    with pytest.raises(InputError, match=r"segmentor=.*net\.py:Net differs on rank 1 \(host1\)"):
        replicas.check_same_code(None, config)  # type: ignore[arg-type]
    answers[1] = answers[0]
    replicas.check_same_code(None, config)  # type: ignore[arg-type]
