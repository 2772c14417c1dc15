"""Tab completion: what bash offers, with the script that is printed for it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from distseg.cli import build_parser, main
from distseg.completion import SHELLS, script
from distseg.config.layers import preset_names
from distseg.config.names import KEYS

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "distseg.bash"
    path.write_text(script(build_parser(), "bash"))
    return path


def offered(bash_script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words; "=" divides words, as readline has it."""
    # the wrapper around it asks readline for something, which is not there in a script
    program = f"""
        compopt() {{ :; }}
        source {shlex.quote(str(bash_script))}
        COMP_WORDS=(distseg {shlex.join(words)}) COMP_CWORD={len(words)}
        _distseg
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    ran = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, cwd=bash_script.parent, check=True
    )
    assert not ran.stderr
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["sweep", "re"], ["resubmit"]),
        (["train", "--dr"], ["--dry-run"]),
        (["export", "--format", "o"], ["onnx"]),
        (["completion", "f"], ["fish"]),
        (["train", "segmentor", "=", "fcn8"], ["fcn8s_vgg16", "fcn8s_atonce_vgg16"]),
        (["train", "preset", "="], preset_names()),
        (["train", "preset", "=", "toy", "mode", "=", "su"], ["supervised"]),
        (["train", "steps", "=", "5", "evaluate.horizontal_flip", "=", "t"], ["true"]),
        (["train", "evaluate.hor"], ["evaluate.horizontal_flip="]),
        # of a key without words: files
        (["train", "data.shards", "=", "dist"], ["distseg.bash"]),
        (["evaluate", "runs/toy", "precision", "=", "bf"], ["bf16"]),
        (["evaluate", "runs/toy", "segmentor"], []),
    ],
)
def test_bash_offers_commands_options_keys_and_values(
    bash_script: Path, words: list[str], expected: list[str]
) -> None:
    assert offered(bash_script, *words) == expected


def test_every_key_is_offered_once_by_the_name_that_one_writes(bash_script: Path) -> None:
    keys = offered(bash_script, "train", "")
    assert keys == [f"{name.removesuffix('.name')}=" for name in KEYS]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_can_read_its_script(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("segmentor", "deeplabv3_resnet50", "dry-run", "voc_hung"))
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(text)
    ran = subprocess.run([program, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
