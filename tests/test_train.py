"""Whole runs from the command line.

Killed and resumed, stopped by a signal, and refused for bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distseg.cli import main
from distseg.config.loading import load
from distseg.data.stream import Batch
from distseg.distributed import device
from distseg.distributed.ranks import Ranks
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.runs import attempts, goodput
from distseg.tracking.tracker import read_metrics
from distseg.train import run as training
from distseg.train import showcase, trainer
from shards.manifest import Manifest
from tests.killed_processes import differences
from tests.ranks import (
    PATIENCE,
    TIMEOUT_SECONDS,
    Job,
    Program,
    bare,
    free_port,
    leave_out,
    restarting,
    run_ranks,
    slow,
    whole,
)

ROOT = Path(__file__).parent.parent
SMALL = [
    "segmentor=multiscale",
    "segmentor.init=random",
    "segmentor.options.norm=batch",
    "segmentor.options.hidden=16",
    "data.crop_px=48",
    "batch_size=4",
    "steps=12",
    "checkpoint.every_steps=3",
]
SMALL += [
    "discriminator=two_branch",
    "discriminator.options.width=0.125",
    "ema_decay=0.9",
    "tracking.log_every=1",
]
SMALL += [
    "tracking.wandb=disabled",
    "evaluate.num_pictures=1",
    "evaluate.every_steps=6",
    "precision=fp32",
]
# random numbers of each step and rank, which a run that goes on has to draw again
DROPOUT = "segmentor.options.dropout=0.1"


def small(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"data.shards={shards}", f"run_dir={run_dir}", *overrides]


def start(num_ranks: int, shards: Path, run_dir: Path, *overrides: str, how: Any = bare) -> Job:
    return Job(num_ranks, ["train", *small(shards, run_dir, *overrides)], how)


def launch(arguments: list[str], command: list[str]) -> subprocess.Popen:
    """As a user does: `python -m torch.distributed.run ... -m distseg.train ...`."""
    words = [sys.executable, "-m", "torch.distributed.run", *arguments]
    words += ["-m", "distseg.train", *command]
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen | Program | Job, expected_code: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == expected_code, output
    return output


def wait_for(path: Path, process: subprocess.Popen | Program | Job) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def kill_after_checkpoint(job: Job, run_dir: Path, checkpoint: str) -> None:
    """SIGKILL to all ranks as soon as a checkpoint is there, of twelve steps."""
    wait_for(run_dir / "checkpoints" / checkpoint, job)
    job.kill()
    job.communicate()
    last = run_dir / "checkpoints" / "step-00000012"
    assert not last.exists(), "killed after its end: start it with how=slow"


def checkpoint_bytes(run_dir: Path) -> dict[str, bytes]:
    """All tensors of the last checkpoint."""
    files = sorted((run_dir / "checkpoints" / "step-00000012").glob("*.safetensors"))
    # segmentor and discriminator: network, optimizer, counters; ema: network, counters
    assert len(files) == 8
    return {file.name: file.read_bytes() for file in files}


def curve(run_dir: Path) -> list[tuple]:
    """(step, losses) of each line of metrics.jsonl, without what depends on the clock."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [
        (
            line["step"],
            {
                key: value
                for key, value in line.items()
                if key.startswith(("loss/", "val/", "grad_norm/"))
            },
        )
        for line in lines
    ]


@pytest.fixture(scope="module")
def uninterrupted(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished runs on one and on two ranks."""
    runs = {n: tmp_path_factory.mktemp("uninterrupted") / f"ranks{n}" for n in (1, 2)}
    for num_ranks, run_dir in runs.items():
        finish(
            start(num_ranks, toy_shards, run_dir, DROPOUT, how=whole if num_ranks == 2 else bare)
        )
    return runs


def test_a_killed_run_resumes_to_the_same_bits(
    toy_shards: Path, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    # after the second, most likely in the evaluation
    for kill_after in ("step-00000003", "step-00000006"):
        job = start(2, toy_shards, run_dir, DROPOUT, how=slow)
        kill_after_checkpoint(job, run_dir, kill_after)
    assert "resumed at step" in finish(start(2, toy_shards, run_dir, DROPOUT, how=whole))
    # every byte of checkpoints, scores, tables and pictures, each step once, with the same losses
    assert differences(run_dir, uninterrupted[2]) == []


def test_torchrun_brings_a_run_back_that_lost_a_rank(
    toy_shards: Path, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    timeout = f"parallel.timeout_seconds={20 * PATIENCE}"
    process = Program(["train", *small(toy_shards, run_dir, DROPOUT, timeout)], how=restarting)
    wait_for(run_dir / "checkpoints" / "step-00000003", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    _, rank_1 = map(int, children.split())  # in the order in which they were started
    os.kill(rank_1, signal.SIGKILL)
    assert "resumed at step" in finish(process)
    assert differences(run_dir, uninterrupted[2]) == []


@pytest.mark.slow
def test_two_launchers_of_one_rank_are_a_launcher_of_two(
    toy_shards: Path, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    """As on two machines, by hand; nothing of it is forked."""
    where = ["--nnodes=2", "--nproc_per_node=1", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    arguments = small(toy_shards, tmp_path / "run", DROPOUT)
    machines = [launch([*where, f"--node_rank={number}"], arguments) for number in range(2)]
    assert "step" in finish(machines[0])
    finish(machines[1])
    assert differences(tmp_path / "run", uninterrupted[2]) == []


def train_recorded(ranks: Ranks, *overrides: str) -> dict[int, list[int]]:
    """A run in this process: a checksum of every image that this rank is trained on, by step."""
    seen, to_device = {}, trainer.to_device

    def record(batch: Batch, *others: Any) -> Any:
        seen[batch.step] = [zlib.crc32(image.numpy().tobytes()) for image in batch.image]
        return to_device(batch, *others)

    leave_out()
    changed: dict[Any, tuple[str, Any]] = {trainer: ("to_device", record)}
    changed[training] = ("joined", lambda *_: contextlib.nullcontext(ranks))
    for module, (name, function) in changed.items():
        setattr(module, name, function)
    training.run(load([*SMALL, *overrides]))
    return seen


def test_a_run_of_two_ranks_goes_on_alike_on_any_other_number(
    toy_shards: Path, tmp_path: Path
) -> None:
    overrides = [
        f"data.shards={toy_shards}",
        "batch_size=12",
        "steps=4",
        "checkpoint.every_steps=2",
    ]
    overrides += ["evaluate.every_steps=0", "segmentor.batch_norm=synchronised"]
    # Not AdamW, which makes much of fp32's rounding
    overrides += ["data.crop_px=32"]
    overrides += [
        f"{network}_optimizer.{key}"
        for network in ("segmentor", "discriminator")
        for key in ("name=sgd", "lr=0.03")
    ]
    runs = {n: tmp_path / f"ranks{n}" for n in (2, 1, 3)}
    seen, last = {}, {}
    for num_ranks, run_dir in runs.items():
        if num_ranks != 2:
            shutil.copytree(runs[2], run_dir)
            shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
        of_ranks = run_ranks(num_ranks, train_recorded, *overrides, f"run_dir={run_dir}")
        seen[num_ranks] = {
            step: [image for of_rank in of_ranks for image in of_rank[step]] for step in of_ranks[0]
        }
        files = (run_dir / "checkpoints" / "step-00000004").glob("*.network.safetensors")
        last[num_ranks] = {file.name: load_file(file) for file in files}
    for num_ranks in (1, 3):
        assert seen[num_ranks] == {step: seen[2][step] for step in (2, 3)}
        far = {
            (file, name): float((tensor.double() - last[2][file][name].double()).abs().max())
            for file, tensors in last[num_ranks].items()
            for name, tensor in tensors.items()
        }
        assert len(far) > 20 and max(far.values()) < 1e-5, max(
            far.items(), key=lambda item: item[1]
        )


def test_a_run_of_a_version_with_other_names_of_keys_goes_on(
    toy_shards: Path, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[1], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    path = run_dir / "config.yaml"
    present = path.read_text().replace(str(uninterrupted[1]), str(run_dir))
    old = present.replace("horizontal_flip", "mirror")
    old = old.replace("gradient_accumulation_steps", "accumulate_steps")
    assert old.count("mirror: ") == 2 and "\naccumulate_steps: 1\n" in old
    path.write_text(old)
    other = finish(start(1, toy_shards, run_dir, DROPOUT, "accumulate_steps=2"), expected_code=2)
    assert "gradient_accumulation_steps: 1 there, 2 now" in other
    output = finish(start(1, toy_shards, run_dir, DROPOUT, "data.mirror=true"))
    assert "resumed at step" in output and path.read_text() == present
    assert output.count("note: data.mirror is now called data.horizontal_flip") == 1
    assert checkpoint_bytes(run_dir) == checkpoint_bytes(uninterrupted[1])


def test_an_evaluation_that_a_kill_prevented_is_made_up(
    toy_shards: Path, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # as a kill between the last checkpoint and its evaluation leaves it
    shutil.copytree(uninterrupted[1], run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "val/mean_iou" in lines[-1]
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]))
    for left_later in ("evaluation.json", "checkpoints/best.json"):
        (run_dir / left_later).unlink()
    finish(start(1, toy_shards, run_dir, DROPOUT))
    assert curve(run_dir) == curve(uninterrupted[1])
    assert (run_dir / "evaluation.json").read_text() == (
        uninterrupted[1] / "evaluation.json"
    ).read_text()
    assert json.loads((run_dir / "checkpoints" / "best.json").read_text())["step"] == 12


def test_a_diverging_run_stops_after_max_skips_and_keeps_its_checkpoints(
    toy_shards: Path, tmp_path: Path
) -> None:
    settings = ["segmentor_optimizer.lr=1e38", "segmentor_optimizer.weight_decay=0", "max_skips=5"]
    output = finish(start(1, toy_shards, tmp_path / "run", *settings), expected_code=2)
    assert "segmentor: 5 non-finite gradients in a row" in output and "max_skips=5" in output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_resumed_run_keeps_its_precision_and_a_finished_one_can_be_ended(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch.setattr)
    run_dir = tmp_path / "run"
    automatic = [
        *SMALL,
        f"data.shards={toy_shards}",
        f"run_dir={run_dir}",
        "precision=auto",
        "steps=1",
        "ema_decay=0",
    ]
    monkeypatch.setattr(device, "_has_bf16", lambda where: True)
    seen = []
    monkeypatch.setattr(showcase, "show", lambda trainer, *_: seen.append(trainer.config.precision))
    assert main(["train", *automatic]) == 0
    monkeypatch.setattr(device, "_has_bf16", lambda where: False)
    monkeypatch.setattr(
        showcase,
        "show",
        lambda trainer, *_: seen.append(
            (trainer.config.precision, signal.getsignal(signal.SIGTERM))
        ),
    )
    assert main(["train", *automatic]) == 0
    assert seen == ["bf16", ("bf16", signal.SIG_DFL)]


def test_fp16_trains_with_a_loss_scale_of_its_own_for_each_network_and_resumes(
    toy_shards: Path, tmp_path: Path
) -> None:
    # convolutions of few channels: fp16 takes a CPU long
    half = [item for item in SMALL if not item.startswith("segmentor")]
    half += [f"segmentor={ROOT}/examples/own_network.py:SmallUNet", "segmentor.options.width=4"]
    half += ["precision=fp16", "gradient_accumulation_steps=2", "data.crop_px=32"]
    half += [f"data.shards={toy_shards}", "evaluate.every_steps=0"]
    jobs = {name: ["train", *half, f"run_dir={tmp_path / name}"] for name in ("whole", "killed")}
    finish(Job(2, jobs["whole"], bare))
    kill_after_checkpoint(Job(2, jobs["killed"], slow), tmp_path / "killed", "step-00000006")
    finish(Job(2, jobs["killed"], bare))
    assert checkpoint_bytes(tmp_path / "killed") == checkpoint_bytes(tmp_path / "whole")
    lines = [
        line
        for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")
        if "loss/segmentor" in line
    ]
    for name in ("segmentor", "discriminator"):  # an update that was left out has halved the scale
        assert all(
            line[f"loss_scale/{name}"] == 2 ** (16 - line[f"skips/{name}"]) for line in lines
        )
    assert lines[-1]["loss/cross_entropy"] < lines[0]["loss/cross_entropy"]


def test_pictures_are_drawn_by_the_network_that_was_scored(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    plain = TestTimeAugmentation.__call__
    monkeypatch.setattr(
        TestTimeAugmentation,
        "__call__",
        lambda view, network, image: modes.append(network.training) or plain(view, network, image),
    )
    assert (
        main(
            [
                "train",
                *SMALL,
                f"data.shards={toy_shards}",
                f"run_dir={tmp_path}",
                "steps=1",
                "ema_decay=0",
            ]
        )
        == 0
    )
    assert modes == [False] * 5  # four validation images scored, one drawn


SEMI = [
    "mode=semi_supervised",
    "data.labelled=1/2",
    "semi.batch_size=2",
    "semi.start_step=4",
    "semi.threshold=0.4",
]
SEMI += ["discriminator.options.head=patch"]


def test_semi_supervised_training_resumes_to_the_same_bits_and_never_reads_an_unlabelled_label(
    toy_shards: Path, tmp_path: Path
) -> None:
    finish(start(2, toy_shards, tmp_path / "whole", *SEMI, DROPOUT))
    labelled = (tmp_path / "whole" / "labelled.txt").read_text().split()
    assert len(labelled) == 4
    damaged = tmp_path / "shards"
    shutil.copytree(toy_shards, damaged)
    damage_labels(damaged, keep=labelled)
    job = start(2, damaged, tmp_path / "killed", *SEMI, DROPOUT, how=slow)
    kill_after_checkpoint(job, tmp_path / "killed", "step-00000006")
    finish(start(2, damaged, tmp_path / "killed", *SEMI, DROPOUT))
    assert checkpoint_bytes(tmp_path / "killed") == checkpoint_bytes(tmp_path / "whole")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines if "semi/mask_share" in line] == list(range(5, 13))
    assert all("loss/adversarial_unlabelled" in line for line in lines if "loss/segmentor" in line)
    for line in (line for line in lines if "loss/segmentor" in line):
        # of the longest step of any rank, which is about the main rank's
        share = line["data_wait_seconds"] / line["step_seconds"]
        assert 0 < line["data_wait_share"] == pytest.approx(share, rel=0.2) and share < 1


def damage_labels(shards: Path, keep: list[str]) -> None:
    """Change a byte of every label in the training shards but those of some samples."""
    for index in shards.glob("train-*.index.json"):
        tar = shards / index.name.replace(".index.json", ".tar")
        content = bytearray(tar.read_bytes())
        for sample in json.loads(index.read_text()):
            if sample["key"] not in keep:
                content[sample["members"]["png"][0] + 40] ^= 1
        tar.write_bytes(content)


def test_training_stops_early_when_validation_no_longer_improves(
    toy_shards: Path, tmp_path: Path
) -> None:
    rules = ["evaluate.every_steps=2", "schedule=plateau", "schedule.plateau_patience=1"]
    rules += [
        "schedule.early_stop_patience=2",
        "segmentor_optimizer.lr=0",
        "ema_decay=0",
        "mode=supervised",
    ]
    # no batch norm: nothing can improve
    rules += ["segmentor.options.norm=none"]
    run = tmp_path / "run"
    output = finish(start(2, toy_shards, run, *rules))
    val_losses = [
        line["val/loss"] for line in read_metrics(run / "metrics.jsonl") if "val/loss" in line
    ]
    assert len(val_losses) == 3, "stops at the second evaluation without a lower loss"
    assert "plateau at step 4" in output and "training ends at step 6" in output
    assert "resumed at step" in finish(start(1, toy_shards, run, *rules))  # and does not go on
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 6


def test_each_signal_saves_at_the_step_and_the_same_command_goes_on(
    toy_shards: Path, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    run_dir, step = tmp_path / "signalled", 0
    every = [DROPOUT, "checkpoint.every_steps=1", "checkpoint.keep_last=12"]
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        process = start(1, toy_shards, run_dir, *every, how=slow)
        wait_for(run_dir / "checkpoints" / f"step-{step + 1:08d}", process)
        process.send_signal(number)
        output = finish(process)
        saved = sorted((run_dir / "checkpoints").glob("step-*"))[-1].name
        step, name = int(saved.removeprefix("step-")), signal.Signals(number).name
        last = f"stopped at step {step} of 12 ({name} here), checkpoint saved"
        assert output.splitlines()[-1] == f"{last}: the same command goes on from there"
        assert step < 12
    output = finish(start(1, toy_shards, run_dir, *every))
    found = goodput.of_run(run_dir)
    assert found is not None and found.text() in output and " in 4 attempts" in found.text()
    first, *_, last_one = attempts.read(run_dir)
    assert first.began is not None and last_one.ended is not None
    # the parts add up to the time from the first start to the end, and nothing was done twice
    assert abs(found.wall_seconds - (last_one.ended - first.began)) < 0.02 * found.wall_seconds
    assert abs(found.share("unknown")) < 0.02 and found.share("repeated") == 0
    assert checkpoint_bytes(run_dir) == checkpoint_bytes(uninterrupted[1])
    assert curve(run_dir) == curve(uninterrupted[1])


def test_a_finished_run_leaves_scores_curves_and_pictures(
    toy_shards: Path, uninterrupted: dict[int, Path]
) -> None:
    run_dir = uninterrupted[2]
    scores = json.loads((run_dir / "evaluation.json").read_text())
    label_pixels = sum(Manifest.load(toy_shards).splits["val"].class_pixels)
    assert scores["num_images"] == 4 and scores["val/num_pixels"] == label_pixels
    assert scores["val/mean_iou"] == curve(run_dir)[-1][1]["val/mean_iou"]
    for name in ("curves.png", "iou.png"):
        assert (run_dir / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((run_dir / "pictures" / "samples").glob("*.png"))) == 1


def test_evaluate_gives_the_training_runs_score_at_any_world_size(
    uninterrupted: dict[int, Path], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    expected = json.loads((uninterrupted[2] / "evaluation.json").read_text())
    run_dir = tmp_path / "copy"
    shutil.copytree(uninterrupted[2], run_dir)
    name = "evaluation-step-00000012-val.json"
    for num_ranks in (1, 3):
        (run_dir / name).unlink(missing_ok=True)
        finish(Job(num_ranks, ["evaluate", str(run_dir)]))
        found = json.loads((run_dir / name).read_text())
        assert {key: found[key] for key in expected} == expected
        of_outlines = ("boundary_f1", "trimap_iou", "mean_boundary_iou", "calibration_error")
        more = {"intervals_95", *(f"val/{score}" for score in of_outlines)}
        of_classes = [name for name in expected if name.startswith("val/iou/")]
        more |= {name.replace("/iou/", "/boundary_iou/") for name in of_classes}
        assert set(found) - set(expected) == more


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "needed: " in message and "to do: " in message
    return message


def test_bad_input_is_refused_before_training(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [*SMALL, f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"]
    assert "distseg pack" in refusal(capsys, *good, f"data.shards={tmp_path}")
    assert "did you mean batch_size?" in refusal(capsys, *good, "batchsize=4")
    assert "has 8 classes (sky, tree" in refusal(capsys, *good, "data.num_classes=21")
    assert "one of: train, val" in refusal(capsys, *good, "data.val_split=test")
    assert "two_branch" in refusal(capsys, *good, "discriminator=patchgan")
    assert "width" in refusal(capsys, *good, "discriminator.options.depth=3")
    assert "unlabelled samples" in refusal(capsys, *good, "mode=semi_supervised")
    assert "with mode=supervised" in refusal(
        capsys, *good, "mode=supervised", "loss.adv_weight=0.1"
    )
    assert "data.labelled=2" in refusal(capsys, *good, "data.labelled=2")
    assert "some of: sky" in refusal(capsys, *good, "data.keep_classes=[street]")
    assert "evaluate.every_steps" in refusal(
        capsys, *good, "schedule=plateau", "evaluate.every_steps=0"
    )
    assert "momentum" in refusal(capsys, *good, "segmentor_optimizer.nesterov=true")
    assert "data.crop_px=128" in refusal(capsys, *good, "discriminator=fully_convolutional")
    assert "parallel.strategy=fsdp" in refusal(capsys, *good, "parallel.shard_size=2")
    ranks = {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for key, value in ranks.items():
        monkeypatch.setenv(key, value)
    assert "batch_size=4 for 3 ranks" in refusal(capsys, *good)
    sliced = ["batch_size=3", "parallel.strategy=fsdp", "parallel.shard_size=2"]
    assert "parallel.shard_size=2 for 3 ranks" in refusal(capsys, *good, *sliced)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_configuration_is_left_alone(
    toy_shards: Path, uninterrupted: dict[int, Path]
) -> None:
    run_dir = uninterrupted[1]
    before = checkpoint_bytes(run_dir)
    output = finish(start(1, toy_shards, run_dir, DROPOUT, "loss.adv_weight=0.5"), expected_code=2)
    assert "loss.adv_weight: 0.05 there, 0.5 now" in output
    assert checkpoint_bytes(run_dir) == before


def test_an_unreadable_shard_stops_all_ranks_and_names_the_sample(
    toy_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_shards, shards)
    for tar in shards.glob("train-*.tar"):
        content = bytearray(tar.read_bytes())
        content[900] ^= 1  # inside the first image of each shard
        tar.write_bytes(content)
    process = start(2, shards, tmp_path / "run")
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "toy_" in output and ".tar" in output and "needed: " in output
