"""Whole runs of code of the user's own: the examples, killed, resumed, evaluated and exported."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from distseg.cli import main
from distseg.config import loading
from distseg.config.names import flattened
from distseg.config.rules import check
from distseg.distributed.ranks import Ranks, teardown
from distseg.evaluate.inference import probabilities
from distseg.evaluate.trained import trained_segmentor
from distseg.export.formats import read_safetensors
from distseg.export.hub import _without_places
from launchers import job
from launchers.check import check_run
from launchers.places import RANKS_VARIABLE
from launchers.submission import Resources, prepare
from launchers.supervisor import Decision, Supervisor
from shards.errors import InputError
from tests.ranks import TIMEOUT_SECONDS, Job, run_ranks, slow
from tests.test_train import SMALL, checkpoint_bytes, curve, kill_after_checkpoint
from tests.tiny import no_curves

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = ("own_network.py", "own_discriminator.py", "own_view.py")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, that tests may change copies of."""
    folder = tmp_path_factory.mktemp("code")
    for name in FILES:
        shutil.copy(EXAMPLES / name, folder)
    return folder


def own(code: Path, shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The arguments of a small run through three doors."""
    small = [item for item in SMALL if not item.startswith(("segmentor", "discriminator"))]
    doors = [f"segmentor={code}/own_network.py:SmallUNet", "segmentor.options.width=4"]
    doors += [f"discriminator={code}/own_discriminator.py:Patches", "discriminator.options.width=4"]
    doors += [f"data.view={code}/own_view.py:CutOut", "data.view_options.side_px=12"]
    # 47 is no multiple of 4, which the network's sides have to be
    places = [
        f"data.shards={shards}",
        f"run_dir={run_dir}",
        "data.crop_px=47",
        "evaluate.num_pictures=0",
    ]
    return [*small, *doors, *places, *overrides]


def train(num_ranks: int, arguments: list[str], expected_code: int = 0) -> str:
    job = Job(num_ranks, ["train", *arguments])
    output, _ = job.communicate(TIMEOUT_SECONDS)
    assert job.returncode == expected_code, output
    return output


@pytest.fixture(scope="module")
def finished(toy_shards: Path, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing has disturbed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(2, own(code, toy_shards, run_dir))
    return run_dir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Such a run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_killed_run_resumes_to_the_same_bits(
    toy_shards: Path, code: Path, finished: Path, tmp_path: Path
) -> None:
    arguments = own(code, toy_shards, tmp_path / "run")
    kill_after_checkpoint(Job(2, ["train", *arguments], slow), tmp_path / "run", "step-00000006")
    assert "resumed at step" in train(2, arguments)
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(finished)
    assert curve(tmp_path / "run") == curve(finished)


@no_curves()
def train_each(_: Ranks, runs: list[list[str]]) -> None:
    """Several runs, one after the other, on the ranks of a test."""
    teardown()  # of the test's own job: each run joins its own
    for arguments in runs:
        assert main(["train", *arguments]) == 0


def test_other_strategies_give_the_losses_of_ddp(
    toy_shards: Path, code: Path, finished: Path, tmp_path: Path
) -> None:
    settings = {"fsdp": [], "deepspeed": ["ema_decay=0"]}
    if find_spec("deepspeed") is None:
        del settings["deepspeed"]
    runs = []
    for strategy, more in settings.items():
        short = ["steps=2", "evaluate.every_steps=0", f"parallel.strategy={strategy}", *more]
        runs.append(own(code, toy_shards, tmp_path / strategy, *short))
    run_ranks(2, train_each, runs)
    (_, expected) = curve(finished)[0]
    for strategy in settings:
        (_, found) = curve(tmp_path / strategy)[0]
        for name in ("loss/cross_entropy", "loss/adversarial", "loss/discriminator_fake"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), (strategy, name)
        assert (tmp_path / strategy / "evaluation.json").is_file()


def test_the_code_is_recorded_with_its_files(finished: Path, code: Path) -> None:
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    of_parts = dict(zip(("segmentor", "discriminator", "data.view"), FILES, strict=True))
    for part, name in of_parts.items():
        assert saved["code"][part] == hashlib.sha256((code / name).read_bytes()).hexdigest()
    assert saved["segmentor"]["name"] == f"{code}/own_network.py:SmallUNet"


def test_it_is_evaluated_predicted_and_exported(
    finished: Path, tmp_path: Path, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((finished / "evaluation.json").read_text())
    assert main(["evaluate", str(finished)]) == 0
    after = json.loads((finished / "evaluation-step-00000012-val.json").read_text())
    assert after["confusion"] == before["confusion"]
    segmentor, _, _ = trained_segmentor(finished, "last")
    image = torch.randint(0, 256, (70, 91, 3), dtype=torch.uint8).numpy()
    expected = probabilities(segmentor, image)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    # (the program that torch-export saves is what ONNX is written from)
    for form in ("onnx", "safetensors"):
        out = tmp_path / form
        assert main(["export", str(finished), "--format", form, "--out", str(out)]) == 0
    session = onnxruntime.InferenceSession(
        str(tmp_path / "onnx"), providers=["CPUExecutionProvider"]
    )
    found = torch.from_numpy(session.run(["logits"], {"image": batch.numpy()})[0]).softmax(1)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    Image.fromarray(image).save(tmp_path / "picture.png")
    assert (
        main(["predict", str(finished), f"{tmp_path}/picture.png", "--out", f"{tmp_path}/out"]) == 0
    )
    label = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "picture.png")))
    assert torch.equal(label, expected.argmax(0).to(torch.uint8))
    # the code is not in the file: it is found where Python is started, and nowhere else
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no file .*own_network.py"):
        read_safetensors(tmp_path / "safetensors")
    shutil.copy(EXAMPLES / "own_network.py", tmp_path)
    again = read_safetensors(tmp_path / "safetensors")
    assert torch.equal(probabilities(again, image), expected)
    with safe_open(tmp_path / "safetensors", framework="pt") as file:
        assert str(finished.parent) not in file.metadata()["distseg"]


def test_a_models_folder_names_no_place_of_this_machine(finished: Path, code: Path) -> None:
    config = loading.from_file(finished / "config.yaml")
    assert str(code) in loading.to_yaml(config)
    assert str(code) not in loading.to_yaml(_without_places(config))
    # what is left is a configuration as any other, whatever the run's data were
    data = replace(config.data, unlabelled_shards=["there"], unlabelled_split="extra")
    left = _without_places(replace(config, mode="semi_supervised", data=data))
    check(left, flattened(loading.to_dict(left)))


@no_curves()
def test_a_changed_file_is_told_on_evaluation_and_refused_on_resuming_and_one_gone_is_named(
    copied: Path,
    toy_shards: Path,
    code: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    changed = Path(shutil.copytree(code, tmp_path / "code"))
    arguments = own(changed, toy_shards, copied)
    # moved, but the same: the run goes on
    assert main(["train", *arguments]) == 0
    with (changed / "own_network.py").open("a") as file:
        file.write("# a comment\n")
    assert main(["train", *arguments]) == 2
    with pytest.raises(InputError, match=r"(?s)own_network.py.* has changed since.*allow_changed"):
        check_run(arguments, 1)
    caplog.clear()
    assert main(["evaluate", str(copied), "--quick"]) == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{changed}/own_network.py has changed since training: scores may not be the run's"
    ]
    assert main(["train", *arguments, "allow_changed_code=true"]) == 0
    caplog.clear()
    assert main(["evaluate", str(copied), "--quick"]) == 0 and not caplog.records
    (changed / "own_network.py").unlink()
    capsys.readouterr()
    for command in (["evaluate"], ["export"]):
        assert main([*command, str(copied)]) == 2
        assert f"no file {changed}/own_network.py" in capsys.readouterr().err


class InThisProcess(Supervisor):
    """Trains here; with processes of their own: tests/test_sweeps.py."""

    def run(self) -> Decision:
        assert os.environ[RANKS_VARIABLE] == "2"
        assert main(["train", *self._arguments]) == 0
        return Decision("done", "done")


@no_curves()
def test_a_job_finds_files_where_it_was_submitted(
    toy_shards: Path, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "Supervisor", InThisProcess)
    monkeypatch.setenv(RANKS_VARIABLE, "1")  # until the job sets it
    monkeypatch.chdir(code)
    arguments = own(Path(), toy_shards, tmp_path / "run", "steps=2", "evaluate.every_steps=0")
    (submitted,) = prepare([arguments], Resources(executor="debug", ranks_per_node=2))
    monkeypatch.chdir(tmp_path)  # as a job starts anywhere
    assert submitted()["step"] == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["segmentor"]["name"] == f"{code}/own_network.py:SmallUNet"


def test_opening_a_run_runs_no_code_that_lies_in_it(
    copied: Path,
    toy_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    trap = (EXAMPLES / "own_network.py").read_text() + f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (copied / "of_the_run.py").write_text(trap)
    picture = str(next((copied / "pictures").rglob("*.png")))
    file = copied / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    monkeypatch.chdir(copied)
    for name in (f"{copied}/of_the_run.py:SmallUNet", "of_the_run.py:SmallUNet"):
        saved["segmentor"]["name"] = name
        file.write_text(yaml.safe_dump(saved))
        for command in (["evaluate"], ["export"], ["predict"]):
            more = [picture, "--out", str(tmp_path / "out")] if command == ["predict"] else []
            assert main([*command, str(copied), *more]) == 2
            assert "lies in the run directory" in capsys.readouterr().err
    saved["segmentor"]["name"] = "of_the_run:SmallUNet"
    file.write_text(yaml.safe_dump(saved))
    assert main(["evaluate", str(copied)]) == 2
    assert "no module of_the_run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    # nor does training start with code from where it would be refused later
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "own_network.py").write_text(trap)
    arguments = own(tmp_path / "new", toy_shards, tmp_path / "new")
    for name in FILES[1:]:
        shutil.copy(EXAMPLES / name, tmp_path / "new")
    assert main(["train", *arguments]) == 2
    assert "own_network.py lies in run_dir=" in capsys.readouterr().err
    assert not (tmp_path / "new" / "config.yaml").exists()


def test_what_is_wrong_with_own_code_is_told_before_data_are_read(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("def net(num_classes): return num_classes\n")
    base = [*SMALL, f"data.shards={toy_shards}", "run_dir=run"]
    for reference, message in (
        ("bad.py:nett", "did you mean net?"),
        ("bad:net", "makes a int"),
        ("absent.py:net", "no file"),
    ):
        kept = [item for item in base if not item.startswith("segmentor")]
        assert main(["train", *kept, f"segmentor={reference}"]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", *base, "code={segmentor: abc}"]) == 2
    assert "training fills it in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
