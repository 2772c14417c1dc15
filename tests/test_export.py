"""Exported files: the original's outputs at any size, nothing but the file needed, and none that
differs is kept.
"""

from __future__ import annotations

import functools
import json
import operator
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from distseg.cli import main
from distseg.config import loading
from distseg.distributed.ranks import Ranks
from distseg.evaluate.inference import probabilities
from distseg.evaluate.trained import trained_segmentor
from distseg.export import command, formats, hub
from distseg.export.formats import FullResolution, describe
from distseg.export.hub import EXAMPLE
from distseg.models import (
    COMPOSITIONS,
    ENCODERS,
    HEADS,
    SEGMENTORS,
    build_segmentor,
    resnet,
    vgg,
)
from distseg.runs.checkpointer import Checkpointer
from tests.tiny import NARROW_VGG, every_part, narrow_encoder

CLASSES, PALETTE = ["sky", "a|b", "road"], [[86, 180, 233], [0, 110, 70], [120, 120, 120]]
MULTISCALE = {"hidden": 16}
# narrow enough for some seconds; with `multiscale`, below, they have most operations of the rest
SMALL = {"fcn8s_vgg16": {"fc_channels": 16}, "deeplabv3plus_resnet50": {"width": 4}}
FEWER_BLOCKS = {50: (1, 1, 1, 2)}  # the second of the last stage is dilated
NAMES = [name for name in SEGMENTORS if name not in COMPOSITIONS]
NAMES += every_part(HEADS, list(ENCODERS))
OTHER_OPTIONS = [
    ("deeplabv2_resnet101", {"layout": "caffe"}),
    ("dilated8_vgg16", {"border": "mirror"}),
    ("deeplabv3plus_resnet50", {"encoder_stride": 8}),
    ("multiscale", {"pyramid": "gaussian", "norm": "batch", "activation": "relu"}),
]


def lively(name: str, num_classes: int = 3, **options: object) -> nn.Module:
    """A segmentor whose every layer matters.

    Random statistics, no zero scores, logits of a few units.
    """
    torch.manual_seed(0)
    segmentor = (
        build_segmentor(name, num_classes, init="random", **options).eval().requires_grad_(False)
    )
    for layer in segmentor.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
        elif isinstance(layer, nn.Conv2d) and layer.weight.std() < 0.02:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    scale = float(segmentor(torch.rand(1, 3, 97, 131)).abs().max())
    last = [
        m for m in segmentor.modules() if isinstance(m, nn.Conv2d) and m.out_channels == num_classes
    ]
    for layer in last:  # all that are added up to the logits
        layer.weight /= scale / 4
        if layer.bias is not None:
            layer.bias /= scale / 4
    return segmentor


def about(name: str, options: dict) -> dict:
    return describe(name, options, CLASSES, PALETTE)


def check(name: str, options: dict, form: str, folder: Path) -> None:
    segmentor = lively(name, **options)
    logits = FullResolution(segmentor)(torch.rand(1, 3, 97, 131))
    assert logits.abs().max() > 0.5 and logits.std() > 0.05, "else the comparison would say little"
    assert formats.export(segmentor, about(name, options), form, folder / "model") <= 1e-4
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(folder / "model"))
        shapes = [*session.get_inputs(), *session.get_outputs()]
        assert [value.shape for value in shapes] == [
            ["batch", 3, "height", "width"],
            ["batch", 3, "height", "width"],
        ]
        assert (
            json.loads(session.get_modelmeta().custom_metadata_map["distseg"])["classes"] == CLASSES
        )


@pytest.mark.parametrize(
    "name", ["fcn8s_vgg16", pytest.param("deeplabv3plus_resnet50", marks=pytest.mark.slow)]
)
def test_onnx_gives_the_originals_outputs_at_any_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    # otherwise the same operations again, and wider
    monkeypatch.setattr(resnet, "NUM_BLOCKS", FEWER_BLOCKS)
    monkeypatch.setattr(vgg, "LAYOUT", NARROW_VGG)
    check(name, SMALL[name], "onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch-export", "onnx"])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), *OTHER_OPTIONS])
def test_every_segmentor_is_exported(
    name: str, options: dict, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoder, entry in ENCODERS.items():
        monkeypatch.setitem(ENCODERS, encoder, narrow_encoder(entry))
    check(name, options, form, tmp_path)


class Learner(SimpleNamespace):
    """A network as checkpoints see one."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"network": self.network.state_dict()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: a checkpoint of a small network, its configuration and an evaluation."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    options = [f"segmentor.options.{key}={value}" for key, value in MULTISCALE.items()]
    start = [
        "data.shards=shards",
        "mode=supervised",
        "segmentor=multiscale",
        "segmentor.init=random",
        "steps=7",
    ]
    places = [
        f"data.labelled={run_dir}/some.txt",
        f"data.cache_dir={run_dir}",
        "tracking.entity=me",
    ]
    config = loading.load([*start, *options, *places, f"run_dir={run_dir}"])
    identity = {"classes": CLASSES, "palette": PALETTE, "precision": "fp32"}
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    learner = Learner(network=lively("multiscale", **MULTISCALE))
    Checkpointer(run_dir, 1, identity, ranks).save({"segmentor": learner}, {"step": 7})
    (run_dir / "config.yaml").write_text(loading.to_yaml(config))
    about = {
        "step": 7,
        "data": "toy",
        "split": "val",
        "num_images": 4,
        "scales": [1.0],
        "horizontal_flip": False,
    }
    scores = {
        "val/mean_iou": 0.725,
        "val/pixel_accuracy": 0.9,
        "val/boundary_f1": None,
        "precision": "fp32",
    }
    written = about | scores | {"intervals_95": {"val/mean_iou": [0.7, 0.75]}, "confusion": [[1]]}
    (run_dir / "evaluation.json").write_text(json.dumps(written))
    other = written | {"step": 3, "val/mean_iou": 0.111}
    (run_dir / "evaluation-step-00000003-val.json").write_text(json.dumps(other))
    return run_dir


def test_a_model_card_tells_data_sets_of_one_name_apart() -> None:
    about = {"data": "toy", "split": "val", "num_images": 4, "scales": [1.0], "precision": "fp32"}
    about |= {"horizontal_flip": False, "val/mean_iou": 0.5}
    own, other = about | {"data_sha256": "a" * 64}, about | {"data_sha256": "b" * 64}
    older, camvid = dict(about), about | {"data": "CamVid", "data_sha256": "c" * 64}
    assert hub._names([own, own, camvid]) == ["toy", "toy", "CamVid"]
    evaluations = [own, other, older, camvid]
    names = ["toy (aaaaaaaa)", "toy (bbbbbbbb)", "toy", "CamVid"]
    assert hub._names(evaluations) == names
    rows = [line for line in hub._scores(evaluations).splitlines() if "4 images" in line]
    assert [row.split(",")[0] for row in rows] == [f"| {name}" for name in names]


def test_a_hub_folder_is_all_that_is_needed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "hub"
    for form in ("safetensors", "onnx"):  # its own files are replaced
        assert main(["export", str(finished), "--hub-folder", str(folder), "--format", form]) == 0
    names = {
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
        "predict_onnx.py",
        "training.yaml",
    }
    assert {path.name for path in folder.iterdir()} == names
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "image-segmentation"
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [0.725, 0.9], (
        "of this step only, and only those there are"
    )
    assert (
        "| 72.5 (70.0 to 75.0) | 90.0 |" in card
        and r"| 1 | a\|b | 0, 110, 70 |" in card
        and "hidden=16" in card
    )
    content = json.loads((folder / "config.json").read_text())
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o044, f"{path.name} can be read by others"
        assert str(finished.parent).encode() not in path.read_bytes(), (
            f"{path.name} names a place of this machine"
        )
    saved = loading.from_file(folder / "training.yaml")
    assert (
        saved.data.labelled == "some.txt"
        and (saved.data.shards, saved.run_dir) == ([], "")
        and saved.tracking.entity is None
    )
    assert content["classes"] == CLASSES and len(content["evaluations"]) == 1
    image = np.random.default_rng(0).integers(0, 256, (71, 90, 3), dtype=np.uint8)
    expected = probabilities(trained_segmentor(finished, "last")[0], image).argmax(0).numpy()
    Image.fromarray(image).save(tmp_path / "picture.png")
    picture, labels = tmp_path / "picture.png", tmp_path / "labels.png"
    program = f"""import sys
sys.modules["torch"] = sys.modules["distseg"] = sys.modules["shards"] = None
import runpy
sys.argv = ["x", "model.onnx", r"{picture}", r"{labels}"]
runpy.run_path("predict_onnx.py", run_name="__main__")"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    with Image.open(tmp_path / "labels.png") as labels:
        np.testing.assert_array_equal(labels, expected)
        assert labels.getpalette()[:9] == functools.reduce(operator.iadd, PALETTE, [])
    assert f"{CLASSES[expected[0, 0]]}" in done.stdout
    assert main(["export", str(finished), "--hub-folder", str(finished)]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_safetensors_and_torch_export_need_nothing_but_the_file(
    finished: Path, tmp_path: Path
) -> None:
    original = FullResolution(trained_segmentor(finished, "last")[0])
    image = torch.rand(1, 3, 70, 93)
    for form, file in (
        ("safetensors", tmp_path / "a.safetensors"),
        ("torch-export", tmp_path / "b.pt2"),
    ):
        assert main(["export", str(finished), "--format", form, "--out", str(file)]) == 0
    read = FullResolution(formats.read_safetensors(tmp_path / "a.safetensors"))
    assert torch.equal(read(image), original(image))
    extra = {"distseg.json": ""}
    program = torch.export.load(tmp_path / "b.pt2", extra_files=extra)
    torch.testing.assert_close(program.module()(image), original(image), rtol=0, atol=1e-5)
    assert json.loads(extra["distseg.json"])["classes"] == CLASSES
    state = build_segmentor(
        "multiscale", 3, init=str(tmp_path / "a.safetensors"), **MULTISCALE
    ).state_dict()
    assert all(
        torch.equal(state[key], value) for key, value in original.segmentor.state_dict().items()
    )


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmentor = lively("multiscale", **MULTISCALE)
    writer, reader = formats._FORMATS["safetensors"]
    for change in (
        lambda y: y + 1e-3 * torch.rand(y.shape),
        lambda y: y[..., :-1],
        lambda y: y * float("nan"),
    ):

        def wrong(path: Path, change=change) -> formats.Runner:
            run = reader(path)
            return lambda image: change(run(image))

        monkeypatch.setitem(formats._FORMATS, "safetensors", (writer, wrong))
        with pytest.raises(RuntimeError, match="safetensors"):
            formats.export(
                segmentor,
                about("multiscale", MULTISCALE),
                "safetensors",
                tmp_path / "m.safetensors",
            )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_that_is_stopped_leaves_nothing_and_says_what_it_did(
    number: signal.Signals,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "m.safetensors"
    words = ["export", str(finished), "--format", "safetensors", "--out", str(out)]
    writer, reader = formats._FORMATS["safetensors"]

    def stopped(*arguments: Any) -> None:
        writer(*arguments)
        assert [path.name for path in tmp_path.iterdir()] == [arguments[-1].name]
        signal.raise_signal(number)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setitem(formats._FORMATS, "safetensors", (stopped, reader))
        if number == signal.SIGINT:
            assert main(words) == 130
        else:
            with pytest.raises(SystemExit) as left:
                main(words)
            assert left.value.code == 128 + number
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) == before
    # what nothing could answer, a kill -9, has left is removed by the next one
    (tmp_path / f".partial-99999999-{out.name}").write_text("half")
    capsys.readouterr()
    assert main(words) == 0
    assert list(tmp_path.iterdir()) == [out]
    said = capsys.readouterr().err
    assert f"writing {out}" in said and f"comparing {out.name} with the network" in said


def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        formats, "find_spec", lambda name: None if name == "onnxruntime" else object()
    )
    with pytest.raises(formats.InputError, match=r"onnxruntime not installed[\s\S]*\.\[export\]"):
        command.run(tmp_path / "missing", "last", "onnx", None, None)


def test_the_example_is_installed_with_the_package(tmp_path: Path) -> None:
    assert EXAMPLE.parent == Path(formats.__file__).parent
    shutil.copy(EXAMPLE, tmp_path)
    done = subprocess.run([sys.executable, tmp_path / EXAMPLE.name], capture_output=True, text=True)
    assert done.returncode == 1 and "python predict_onnx.py model.onnx" in done.stderr
