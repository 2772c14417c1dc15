"""A trained segmentor as a file for others.

ONNX, torch.export or safetensors, checked before it is there.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from distseg.config.schema import Config
from distseg.evaluate.inference import probabilities
from distseg.evaluate.trained import trained_segmentor
from distseg.models import build_segmentor
from distseg.models.own_segmentor import OwnSegmentor
from distseg.runs.version import package_version
from shards import user_code
from shards.errors import InputError
from shards.files import published, say, working
from shards.sample import IGNORE_INDEX
from shards.words import counted

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
# the key of the JSON text in all three formats (torch.export: the extra file distseg.json)
METADATA = "distseg"
# from 64 on no map of any segmentor has a single cell, which is another case
MIN_SIDE_PX, MAX_SIDE_PX = 64, 8192
TOLERANCE = 1e-4  # of probabilities, and of logits as a share of the largest
# images, height, width; even, odd, above and below
CHECKED_SIZES = ((1, 64, 64), (2, 97, 131), (1, 72, 160))
_OPSET = 18

Runner = Callable[[Tensor], Tensor]  # image (N, 3, H, W) float32 in [0, 1] -> logits (N, C, H, W)


class FullResolution(nn.Module):
    """A segmentor whose logits have the image's size.

    (N, 3, H, W) float32 in [0, 1], RGB -> (N, C, H, W).
    """

    def __init__(self, segmentor: nn.Module):
        super().__init__()
        self.segmentor = segmentor

    def forward(self, image: Tensor) -> Tensor:
        # in the file, so that its user needs to know nothing of output strides
        return F.interpolate(
            self.segmentor(image), image.shape[-2:], mode="bilinear", align_corners=False
        )


@dataclass(frozen=True)
class Trained:
    """What is exported: the network in evaluation mode, fp32 on the CPU, and what its user has to
    know.
    """

    segmentor: nn.Module
    metadata: dict[str, Any]
    config: Config
    step: int


def check_packages(form: str) -> None:
    """Raise InputError when a package for the format is not installed."""
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if form == "onnx" and find_spec(name) is None
    ]
    if missing:
        raise InputError(
            f"{', '.join(missing)} not installed",
            "these packages, for ONNX",
            "pip install -e '.[export]' in the repository",
        )


def load(run_dir: Path, which: str) -> Trained:
    """The segmentor of a run's checkpoint. Raises InputError where there is none."""
    segmentor, config, found = trained_segmentor(run_dir, which)
    identity = found.identity
    metadata = describe(
        config.segmentor.name, config.segmentor.options, identity["classes"], identity["palette"]
    )
    # the code itself is not in the file; its hash says whether what is there now is the same
    if "segmentor" in config.code:
        metadata["code_sha256"] = config.code["segmentor"]
    # whatever the run computed in: the file is for any device
    return Trained(segmentor.float(), metadata, config, found.step)


def describe(
    name: str, options: dict[str, Any], classes: list[str], palette: list[list[int]]
) -> dict[str, Any]:
    """What a user of the file has to know, as JSON's types."""
    sides = {"min_side_px": MIN_SIDE_PX, "max_side_px": MAX_SIDE_PX}
    pixels = {
        "name": "image",
        "layout": "NCHW",
        "type": "float32",
        "channels": "RGB",
        "range": [0, 1],
    }
    action = "divide 8-bit values by 255; mean and deviation are inside the network"
    scores = {"name": "logits", "layout": "NCHW", "type": "float32", "size": "the image's"}
    return {
        # without the folder, which is of this machine only
        "segmentor": user_code.short(name),
        "options": options,
        "classes": classes,
        "palette": palette,
        "void_index": IGNORE_INDEX,
        "input": pixels | sides | {"preprocessing": action},
        "output": scores
        | {"meaning": "argmax over axis 1 is the class index, softmax the probabilities"},
        "made_with": {"distseg": package_version(), "torch": torch.__version__},
    }


def export(segmentor: nn.Module, metadata: dict[str, Any], form: str, out: Path) -> float:
    """Write a segmentor (evaluation mode, fp32, CPU) to `out`, if what is written does what the
    segmentor does.

    form: onnx, torch-export or safetensors. metadata: of `describe`. Returns the largest difference
    of a probability on random images of several sizes. Raises RuntimeError, and writes nothing,
    when it is above TOLERANCE; InputError when `out` is a folder.
    """
    if out.is_dir():
        raise InputError(
            f"{out}, which is a folder",
            "a file to write",
            "name one with --out, or write --hub-folder",
        )
    writer, reader = _FORMATS[form]
    # eval: the stored statistics of batch normalisation go into the graph as constants
    original = FullResolution(segmentor).eval().requires_grad_(False)
    # the check below is inside: when it fails, nothing is left under the name
    with published(out) as partial:
        say(f"writing {out}: the network as {form}")
        writer(original, metadata, partial)
        sizes = counted(len(CHECKED_SIZES), "size")
        with working(f"comparing {out.name} with the network, at {sizes}"):
            own = isinstance(segmentor, OwnSegmentor) and form == "safetensors"
            # what was written is read again, as its user will
            exported = _with_weights_of(partial, original) if own else reader(partial)
            return largest_difference(original, exported, form)


@torch.no_grad()
def largest_difference(original: FullResolution, exported: Runner, form: str) -> float:
    """The largest difference of a probability between two networks, on random 8-bit images of
    CHECKED_SIZES.

    The original's are those of `inference.probabilities`, so the metadata's preprocessing is
    checked too. Raises RuntimeError above TOLERANCE, for logits too: they may differ where
    probabilities are all near 0 or 1.
    """
    # the same images every time, so that a failure can be seen again
    rng, worst = np.random.default_rng(0), 0.0
    for count, height, width in CHECKED_SIZES:
        # (n, H, W, 3) 8-bit, as pictures are: values between would not test the preprocessing
        images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # (n, 3, H, W)
        found, expected = exported(batch), original(batch)
        # before the subtraction, which could broadcast
        if found.shape != expected.shape:
            raise RuntimeError(
                f"{form} gives {tuple(found.shape)} for an image of {tuple(batch.shape)}"
            )
        # one by one, by the function that evaluation and prediction use
        chances = torch.stack([probabilities(original.segmentor, image) for image in images])
        difference = float((found.softmax(1) - chances).abs().max())
        # fp32 has a relative precision: large logits differ by more
        scale = max(1.0, float(expected.abs().max()))
        of_logits = float((found - expected).abs().max()) / scale
        if not max(difference, of_logits) <= TOLERANCE:  # written so that NaN fails too
            got = (
                f"{difference:.2g} in probabilities, {of_logits:.2g} in logits of up to {scale:.2g}"
            )
            text = f"the {form} file differs from the original at {height}x{width} px by {got}"
            raise RuntimeError(f"{text}; at most {TOLERANCE} is allowed, so it was not kept")
        worst = max(worst, difference)
    return worst


def _program(original: FullResolution) -> torch.export.ExportedProgram:
    """The network as a graph, for any number of images of any size in the bounds."""
    # bounds, as torch.export asks for them, and so that shapes it has not seen are refused
    side = {"min": MIN_SIDE_PX, "max": MAX_SIDE_PX}
    dims = {0: torch.export.Dim("batch", min=1, max=1024)}
    dims |= {2: torch.export.Dim("height", **side), 3: torch.export.Dim("width", **side)}
    layers = sum(1 for layer in original.modules() if not any(layer.children()))
    with working(f"tracing {counted(layers, 'layer')}, which takes minutes where they are many"):
        # an example of none of the sizes that a network has a shorter way for
        return torch.export.export(original, (torch.rand(2, 3, 97, 131),), dynamic_shapes=(dims,))


def _write_onnx(original: FullResolution, metadata: dict[str, Any], path: Path) -> None:
    # its level is changed for the length of the export
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision, which is not needed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of onnxscript's own internals
            options: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": _OPSET}
            names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
            traced = _program(original)
            with working(f"translating {counted(len(traced.graph.nodes), 'operation')} to ONNX"):
                program = torch.onnx.export(traced, (), **options, **names)
    finally:
        # as it was: the process may go on with exports of its own
        log.setLevel(level)
    assert program is not None
    for value, channels in (
        (program.model.graph.inputs[0], 3),
        (program.model.graph.outputs[0], None),
    ):
        shape = value.shape
        assert shape is not None
        value.shape = type(shape)(["batch", channels or shape[1], "height", "width"])
    # inside the file: a second file beside it would get lost
    program.model.metadata_props[METADATA] = json.dumps(metadata)
    program.save(str(path))


def _read_onnx(path: Path) -> Runner:
    import onnxruntime

    # on the CPU, as the original it is compared with
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def _write_torch_export(original: FullResolution, metadata: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()  # of files it takes only names that end in .pt2
    torch.export.save(
        _program(original), content, extra_files={f"{METADATA}.json": json.dumps(metadata)}
    )
    path.write_bytes(content.getbuffer())


def _read_torch_export(path: Path) -> Runner:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _write_safetensors(original: FullResolution, metadata: dict[str, Any], path: Path) -> None:
    # contiguous, as the format asks for; training may have left them in channels_last
    tensors = {
        name: tensor.contiguous() for name, tensor in original.segmentor.state_dict().items()
    }
    # not save_file, whose files only their owner can read
    path.write_bytes(
        safetensors.torch.save(tensors, {"format": "pt", METADATA: json.dumps(metadata)})
    )


def _read_safetensors(path: Path) -> Runner:
    return FullResolution(read_safetensors(path))


def _with_weights_of(path: Path, original: FullResolution) -> FullResolution:
    """A copy of a network of the user's own, whose code is not in the file, with its weights."""
    copied = copy.deepcopy(original)
    for parameter in copied.parameters():
        parameter.zero_()  # what the file does not hold is not there
    copied.segmentor.load_state_dict(safetensors.torch.load_file(path))
    return copied


def read_safetensors(path: Path) -> nn.Module:
    """The segmentor of an exported .safetensors file, in evaluation mode, built from nothing but
    the file.

    The code of one of the user's own is not in it: it is looked for where Python is started.
    """
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[METADATA])
    # random: every weight follows from the file, and none has to be looked for
    segmentor = build_segmentor(
        about["segmentor"], len(about["classes"]), init="random", **about["options"]
    )
    segmentor.load_state_dict(safetensors.torch.load_file(path))
    return segmentor.eval()


# each with its reader, as no file is kept that was not read back and compared
_FORMATS: dict[
    str, tuple[Callable[[FullResolution, dict[str, Any], Path], None], Callable[[Path], Runner]]
] = {
    "onnx": (_write_onnx, _read_onnx),
    "torch-export": (_write_torch_export, _read_torch_export),
    "safetensors": (_write_safetensors, _read_safetensors),
}
