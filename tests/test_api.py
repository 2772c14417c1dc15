"""`import distseg`: training, trained runs and the parts, in a process that lives on."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import distseg
from distseg.cli import main
from distseg.config import loading
from distseg.distributed.ranks import Ranks, joined, teardown
from distseg.evaluate.evaluator import Evaluator
from distseg.evaluate.run import _of_one_checkpoint
from distseg.parallel import wrap
from distseg.tracking.palettes import safe_colors
from distseg.train import trainer
from distseg.train.inputs import open_data, open_streams
from distseg.train.networks import build_networks
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from shards.errors import InputError
from shards.maps import write_maps
from shards.pack import pack
from shards.sample import STANFORD
from tests.conftest import toy_samples
from tests.ranks import CONTEXT, PATIENCE, TIMEOUT_SECONDS, run_ranks
from tests.test_storage import Failing
from tests.tiny import SETTINGS, contents, no_curves


def train(shards: Path, run_dir: Path, **keys: Any) -> Any:
    return distseg.fit([f"data.shards={shards}", f"run_dir={run_dir}"], **SETTINGS | keys)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in ranks: sums in another order have other bits."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def result(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of two steps."""
    return train(toy_shards, tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(autouse=True)
def as_before_any_training() -> Iterator[None]:
    """As in a program that has not trained yet: tests before may have, by the command."""
    gc.unfreeze()
    with no_curves():  # those of `result` are enough
        yield


def process_state() -> dict[str, Any]:
    """What a library must leave as it finds it."""
    return {
        "handlers": [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)],
        "threads": (torch.get_num_threads(), cv2.getNumThreads()),
        "frozen": gc.get_freeze_count(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "joined": dist.is_initialized(),
    }


def test_importing_distseg_imports_nothing_and_takes_no_time() -> None:
    program = "import sys, time; t = time.perf_counter(); import distseg; "
    program += "print(time.perf_counter() - t, 'torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(out[0]) < 0.1 * PATIENCE and out[1:] == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'trains'"):
        _ = distseg.trains


def test_every_place_that_the_documentation_names_is_there() -> None:
    lines = re.findall(r"^    (from [\w.]+ import .+?)(?: +#.*)?$", distseg.__doc__ or "", re.M)
    assert len(lines) == 13
    for line in lines:
        exec(line, {})
    assert set(distseg.__all__) <= set(dir(distseg))
    assert distseg.InputError is InputError


def test_scores_and_predictions_are_those_of_the_commands(result: Any, tmp_path: Path) -> None:
    run_dir = result.run_dir
    assert (result.step, result.finished) == (2, True)
    assert result.scores == json.loads((run_dir / "evaluation.json").read_text())
    trained = distseg.load(run_dir, device="cpu")
    assert main(["evaluate", str(run_dir), "device=cpu", "evaluate.scales=[1,0.5]"]) == 0
    (written,) = run_dir.glob("evaluation-step-00000002-val-*.json")
    scores = trained.evaluate(["evaluate.scales=[1,0.5]"], split="val")
    assert scores == json.loads(written.read_text())
    assert trained.evaluate(quick=True)["val/mean_iou"] == result.scores["val/mean_iou"]

    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    arguments = [str(run_dir), str(tmp_path / "picture.png"), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments, "--device", "cpu"]) == 0
    assert Image.open(tmp_path / "out" / "picture_overlay.png").height > 70, "with a legend"
    label = trained.predict(pixels)
    assert label.dtype == np.uint8 and label.shape == (70, 50)
    assert (label == np.asarray(Image.open(tmp_path / "out" / "picture.png"))).all()
    assert (label == trained.predict(tmp_path / "picture.png")).all()
    probabilities = trained.probabilities(str(tmp_path / "picture.png"))
    assert probabilities.shape == (len(trained.classes), 70, 50)
    assert probabilities.dtype == np.float32 and (probabilities.argmax(0) == label).all()
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    assert len(trained.palette) == len(trained.classes) == trained.network.num_classes


def test_nothing_is_scored_where_scores_cannot_be_written(
    result: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Evaluator, "__call__", lambda _: pytest.fail("scored in vain"))
    monkeypatch.setattr(os, "open", Failing(os.open, errno.EROFS, "/run/.partial-", 60))
    assert main(["evaluate", str(result.run_dir), "device=cpu"]) == 2
    assert f"error: {result.run_dir}: Read-only file system" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_have_the_colours_and_the_form_that_are_asked_for(
    result: Any, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    call = ["predict", str(result.run_dir), str(tmp_path / "a.png"), "--device", "cpu", "--out"]
    assert main([*call, str(tmp_path / "safe"), "--no-legend", "evaluate.palette=safe"]) == 0
    key = json.loads((tmp_path / "safe" / "classes.json").read_text())
    assert [tuple(entry["color"]) for entry in key] == list(safe_colors(8))
    assert Image.open(tmp_path / "safe" / "a_overlay.png").size == (80, 60)

    run = str(result.run_dir)
    for form, keys in (("svg", ["evaluate.num_pictures=2"]), ("pdf", ["evaluate.num_pictures=0"])):
        out = tmp_path / form
        safe = ["evaluate.palette=safe", "device=cpu"]
        assert main(["pictures", run, "--format", form, "--out", str(out), *safe, *keys]) == 0
    assert {path.name for path in (tmp_path / "pdf").iterdir()} == {"curves.pdf", "iou.pdf"}
    keys = [path.stem for path in sorted((tmp_path / "svg" / "samples").iterdir())]
    assert keys == ["toy_08", "toy_10"], "evenly over the four"
    drawn = (tmp_path / "svg" / "samples" / "toy_08.svg").read_text()
    colors = {"#" + bytes(color).hex() for color in safe_colors(8)}
    assert {*re.findall("fill: (#[0-9a-f]{6})", drawn)} & colors
    assert main(["pictures", run, "steps=5"]) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: distseg.load(run / "nowhere"), "a run directory of distseg"),
        (lambda run: distseg.load(run, checkpoint=7), "no checkpoint '7'"),
        (lambda run: distseg.load(run, device="tpu"), "auto, cpu or cuda"),
        (lambda run: distseg.load(run).predict("missing.png"), r"missing\.png: No such file"),
        (lambda run: distseg.load(run).predict(np.zeros((4, 4))), r"\(H, W, 3\) uint8"),
        (lambda run: distseg.load(run).predict(np.array(None)), r"an image of shape \(\)"),
        (lambda run: distseg.load(run).predict(None), r"type NoneType\n.*array, or a path"),
        (lambda run: distseg.load(run).evaluate(["steps=5"]), "as the run was trained"),
        (lambda run: distseg.load(run).evaluate(split="moon"), "moon"),
        (lambda run: distseg.fit(run_dir=run, step=5), "unknown key 'step'"),
        (lambda run: distseg.fit(run_dir=run, steps="many"), "steps"),
    ],
)
def test_bad_input_is_one_clear_error(result: Any, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(result.run_dir)


@no_curves()
def _train_by_command(shards: Path, others: Path, folder: Path) -> None:
    """Trained, refused once its checkpoint is read, and trained elsewhere: one interpreter."""
    torch.set_num_threads(1)
    overrides = [*loading.arguments(SETTINGS | {"seed": 4}), f"data.shards={folder / 'shards'}"]
    codes = []
    for name, data in (("first", shards), ("first", others), ("second", others)):
        (folder / "shards").unlink(missing_ok=True)
        (folder / "shards").symlink_to(data)
        codes.append(main(["train", *overrides, f"run_dir={folder / name}"]))
        assert not dist.is_initialized()
    assert codes == [0, 2, 0], codes


@pytest.fixture(scope="module")
def by_command(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process of its own has trained "first", and "second", which are other data."""
    folder = tmp_path_factory.mktemp("by_command")
    samples = toy_samples()[1:]
    write_maps(folder / "maps.h5", "others", STANFORD, samples, total=len(samples))
    pack(folder / "maps.h5", folder / "others")
    process = CONTEXT.Process(
        target=_train_by_command, args=(toy_shards, folder / "others", folder)
    )
    process.start()
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode == 0, "not free for the next after one that was refused or finished"
    return folder


def test_a_refused_command_changes_nothing_and_a_process_is_free_for_the_next(
    by_command: Path,
) -> None:
    assert (by_command / "first" / "evaluation.json").is_file()
    assert (by_command / "second" / "evaluation.json").is_file()


def test_a_second_training_in_a_process_is_that_of_its_own_and_leaves_it_as_it_was(
    toy_shards: Path, tmp_path: Path, result: Any, by_command: Path
) -> None:
    assert result.finished, "the first one"
    before = process_state()
    train(toy_shards, tmp_path / "own", seed=4)
    assert process_state() == before
    checkpoint = Path("checkpoints") / "step-00000002"
    assert contents(tmp_path / "own" / checkpoint) == contents(by_command / "first" / checkpoint)


def test_an_error_in_the_middle_leaves_nothing_behind(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Any
) -> None:
    before, step = process_state(), trainer.Trainer.train_step

    def failing(self: Any, batch: Any) -> Any:
        if self.state.step == 1:
            raise ZeroDivisionError("in the middle")
        return step(self, batch)

    settings = {"checkpoint": {"every_steps": 1}}
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "train_step", failing)
        with pytest.raises(ZeroDivisionError) as error:
            train(toy_shards, tmp_path / "run", **settings)
    assert process_state() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    # the error is still held, and with it all that its frames name: the lock is free all the same
    assert train(toy_shards, tmp_path / "run", **settings).step == 2 and error.value
    last = Path("checkpoints") / "step-00000002"
    assert contents(tmp_path / "run" / last) == contents(result.run_dir / last)


def test_a_signal_stops_it_at_a_step_and_the_caller_gets_its_handlers_back(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, step = process_state(), trainer.Trainer.train_step

    def signalled(self: Any, batch: Any) -> Any:
        if self.state.step == 1:  # once: a second Ctrl-C does not wait for the step
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", signalled)
    stopped = train(toy_shards, tmp_path / "run", steps=50)
    # agreed upon at the beginning of the step after
    assert (stopped.step, stopped.finished, stopped.scores) == (3, False, {})
    assert process_state() == before


def test_it_trains_in_another_thread_too(toy_shards: Path, tmp_path: Path, result: Any) -> None:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(train(toy_shards, tmp_path / "run").scores)
    )
    thread.start()
    thread.join()
    assert results == [result.scores]


def test_a_process_group_of_the_caller_is_refused_for_training_and_stays(
    toy_shards: Path, tmp_path: Path, result: Any
) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with pytest.raises(InputError, match="destroy_process_group"):
            train(toy_shards, tmp_path / "run")
        with pytest.raises(InputError, match="destroy_process_group"), joined("cpu"):
            pass
        assert dist.is_initialized() and not (tmp_path / "run").exists()
        scores = distseg.load(result.run_dir, device="cpu").evaluate(quick=True)
        assert scores["val/mean_iou"] == result.scores["val/mean_iou"]
    finally:
        dist.destroy_process_group()


def _evaluate(ranks: Ranks, run_dir: Path) -> dict[str, Any]:
    # a rank that is alone has more cores, and more threads, which sum in another order
    torch.set_num_threads(1)
    trained = distseg.load(run_dir, device="cpu")
    # "last" of a run that trains on may be another one for each rank: the main rank's counts
    other = torch.nn.Module() if ranks.rank else trained.network
    own = replace(trained.checkpoint, state={"step": 2 - ranks.rank})
    network, found = _of_one_checkpoint(run_dir, other, own, ranks)
    assert found.step == 2 and network.state_dict().keys() == trained.network.state_dict().keys()
    return trained.evaluate()


@no_curves()
def _evaluate_and_train_twice(
    ranks: Ranks, run_dir: Path, shards: Path, folder: Path
) -> dict[str, Any]:
    scores = _evaluate(ranks, run_dir)
    teardown()  # of the test's own job
    for name in ("first", "second"):
        train(shards, folder / name, steps=1)
    return scores


def test_ranks_share_scores_and_train_twice_and_find_each_other_twice(
    toy_shards: Path, tmp_path: Path, result: Any
) -> None:
    (alone,) = run_ranks(1, _evaluate, result.run_dir)
    scores = run_ranks(2, _evaluate_and_train_twice, result.run_dir, toy_shards, tmp_path)
    assert scores == [alone, alone], "those of one process"
    first, second = (tmp_path / name / "checkpoints/step-00000001" for name in ("first", "second"))
    assert contents(first) == contents(second)


def test_a_loop_of_the_parts_is_the_training(toy_shards: Path, tmp_path: Path) -> None:
    keys = SETTINGS | {"mode": "supervised", "data.shards": toy_shards, "ema_decay": 0}
    config = loading.load(loading.arguments(keys | {"run_dir": tmp_path / "run"}))
    distseg.fit(loading.arguments(keys), run_dir=tmp_path / "run")
    reference = distseg.load(tmp_path / "run", device="cpu").network.state_dict()
    with joined("cpu") as ranks:
        data = open_data(config, ranks.world_size)
        segmentor, _ = build_networks(config, data.train.classes.num_classes)
        learner = wrap(segmentor, config.segmentor_optimizer, config, ranks)
        stream = open_streams(config, ranks, data, start_step=0)
        for step in range(config.steps):
            images = trainer.to_device(next(stream), ranks.device, config)
            training_step(Pair.of(config, learner), phase(step, config), images)
            learner.step(lr_factor=1.0)
        stream.close()
    assert not dist.is_initialized()
    own = segmentor.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in reference.items())


def test_values_that_are_no_keys_are_refused_and_numpys_are_taken() -> None:
    assert loading.arguments({"steps": np.int64(5), "data": {"shards": Path("a")}}) == [
        "steps=5",
        "data.shards=a",
    ]
    with pytest.raises(InputError, match="seed=<object"):
        loading.arguments({"seed": object()})
    with pytest.raises(InputError, match="a list of key=value"):
        distseg.fit("steps=3")  # type: ignore[arg-type]
