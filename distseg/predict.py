"""Label images with a trained segmentor.

Class indices, colours, an overlay, and probabilities on request.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from distseg.config.schema import Config
from distseg.evaluate.inference import probabilities, sliding_window
from distseg.tracking.figures import overlay
from shards.errors import InputError
from shards.files import published, tracked
from shards.sample import ClassSet, encode_label

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
CLASSES_FILE = "classes.json"
MAX_PX = 2048  # larger images take a sliding window, as their maps would take gigabytes
_NUM_THREADS = 4  # read and write pictures while the network works
_NUM_AHEAD = 8  # pictures in memory on either side of the network


@dataclass(frozen=True)
class PredictOptions:
    """How images are looked at and what is written.

    probabilities: also one picture per class. scales, horizontal_flip: test-time augmentation (see
    `inference`). max_px: an image with a longer side is labelled by a sliding window of this side,
    whose places overlap by overlap_px (0: by 256 or less). overlay_alpha: opacity of the class
    colours in [0, 1]. autocast_dtype: None for the model's own precision.
    """

    probabilities: bool = False
    scales: tuple[float, ...] = (1.0,)
    horizontal_flip: bool = False
    max_px: int = MAX_PX
    overlap_px: int = 0
    overlay_alpha: float = 0.5
    device: str = "cpu"
    autocast_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        # below, the window's overlap would be most of it
        if self.max_px < 128:
            raise InputError(
                f"max_px={self.max_px}", "at least 128 pixels", "keep the default of 2048"
            )
        if not 0 <= self.overlay_alpha <= 1:
            raise InputError(
                f"overlay_alpha={self.overlay_alpha}", "0 to 1", "keep the default of 0.5"
            )


def run(
    run_dir: Path,
    images: Path,
    out: Path,
    options: PredictOptions,
    *,
    which: str,
    device: str,
    overrides: Sequence[str],
) -> int:
    """`distseg predict RUN IMAGES --out DIR`: label images with a checkpoint, with the test-time
    augmentation that its run evaluates with.

    which: the checkpoint's name, as `distseg evaluate` takes it. device: auto, cpu or cuda.
    overrides: key=value of keys that may be set for predictions (`distseg predict --help KEY`).
    """
    from distseg.config import loading
    from distseg.evaluate.trained import trained_classes, trained_segmentor

    # cheapest first: a wrong path is told before a checkpoint is read
    paths = collect_images(images)
    where = choose_device(device)
    # a key of training would be taken without an effect
    loading.refuse_others(list(overrides), lambda key: key.at_prediction)
    model, config, found = trained_segmentor(run_dir, which)
    config = loading.override(config, list(overrides))
    predict(model, paths, out, trained_classes(found), of_run(options, config, where))
    return 0


def choose_device(device: str) -> torch.device:
    """auto (cuda where there is one), cpu or cuda. Raises InputError for one that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={device}", "auto, cpu or cuda", "correct it")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device=cuda, but no CUDA device is visible", "a CUDA device", "choose the device cpu"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def of_run(options: PredictOptions, config: Config, where: torch.device) -> PredictOptions:
    """The options with the test-time augmentation and precision of a configuration."""
    from distseg.distributed.device import autocast_dtype, resolve_precision
    from distseg.distributed.ranks import Ranks

    evaluate = config.evaluate
    precision = resolve_precision(config.precision, Ranks(0, 1, 0, where))
    return replace(
        options,
        scales=tuple(evaluate.scales),
        horizontal_flip=evaluate.horizontal_flip,
        # a run that takes images whole still needs a bound here: users bring what they like
        max_px=evaluate.window_px or MAX_PX,
        overlap_px=evaluate.overlap_px if evaluate.window_px else 0,
        device=str(where),
        autocast_dtype=autocast_dtype(precision),
    )


def collect_images(path: Path) -> list[Path]:
    """The image itself, or those directly in a folder, by name.

    Raises InputError where there is none.
    """
    suffixes = ", ".join(IMAGE_SUFFIXES)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist", "an image or a folder of images", "check the path"
        )
    # not into subfolders: results lie in one folder, where names would collide
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not images:
        # the usual mistake is one folder too high, so the error names the right one
        deeper = next(
            (p.parent for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), None
        )
        action = f"name the folder itself, for example {deeper}" if deeper else "check the path"
        raise InputError(f"no image in {path}", f"files ending in {suffixes}", action)
    return images


def predict(
    model: nn.Module, images: list[Path], out: Path, classes: ClassSet, options: PredictOptions
) -> list[Path]:
    """Write the label of every image into the folder `out`, and print the speed.

    model: a segmentor; moved to options.device and set to evaluation mode. Per image, at its size
    and turned upright as its EXIF orientation says: NAME.png (class indices, 8-bit gray),
    NAME_color.png (the same with the palette), NAME_overlay.png, and with options.probabilities
    NAME_prob_CLASS.png (gray, 255 = 1); classes.json names the indices. Returns the paths of the
    index pictures, in the order of `images`. Raises InputError that lists all unreadable images
    before anything is computed.
    """
    _check_fits(model, images, out, classes)
    names = _output_names(images, classes)
    started = time.perf_counter()
    written: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # the last of 10,000 may be broken, and an hour later is no time to say so
        _check(images, pool)
        model = model.to(options.device).eval()
        # threads, not processes: decoders let go of the GIL, and a picture need not be copied to a
        # process
        pictures = _ahead(pool, load_image, images)
        for name, image in zip(names, tracked(pictures, len(images), "predicting"), strict=True):
            result = image_probabilities(model, image, options)
            label = result.argmax(0).to(torch.uint8).cpu().numpy()
            planes = _as_bytes(result) if options.probabilities else None
            files = _Files(out, name, classes, options.overlay_alpha)
            written.append(pool.submit(files.write, image, label, planes))
            # bounded: a slow disk would fill the memory with pictures that wait to be written
            if len(written) > _NUM_AHEAD:
                written.popleft().result()
        # errors of writing are raised here: an exception in a pool is silent until it is asked for
        for future in written:
            future.result()
    # last: a folder that has it is complete
    _write_classes(out / CLASSES_FILE, classes)
    took = _speed(len(images), time.perf_counter() - started)
    print(f"{took}, reading and writing included: {out}")
    return [out / f"{name}.png" for name in names]


def _check_fits(model: nn.Module, images: list[Path], out: Path, classes: ClassSet) -> None:
    """Raise InputError for an `out` that holds the images, and for another network's classes."""
    # A.png would overwrite A.png, and the images would be gone
    if out.resolve() in {image.resolve().parent for image in images}:
        raise InputError(
            f"{out} holds the images themselves", "another folder", "choose another --out"
        )
    # else names of classes would be given to the wrong ones without an error
    if model.num_classes != classes.num_classes:
        got = f"a network with {model.num_classes} classes and {classes.num_classes} class names"
        raise InputError(got, "as many names as classes", "use the classes it was trained on")


def _speed(count: int, seconds: float) -> str:
    each = f"{count / seconds:.1f} images/s"
    if seconds >= count:
        each = f"{seconds / count:.1f} s an image"
    return f"{count} images in {seconds:.1f} s ({each})"


def _as_bytes(probabilities: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] -> uint8, 255 = 1."""
    # rounded: plain truncation would never give 255 for less than exactly 1
    return (probabilities * 255).round().to(torch.uint8).cpu().numpy()


def _write_classes(path: Path, classes: ClassSet) -> None:
    key = []
    for index, (name, color) in enumerate(zip(classes.names, classes.palette, strict=True)):
        key.append({"index": index, "name": name, "color": color})
    with published(path) as partial:
        partial.write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: turned as the EXIF orientation says.

    Gray is repeated, transparency dropped, 16-bit values are divided by 257 and rounded. Raises
    OSError, ValueError or another of Pillow's errors for a file that is not such an image.
    """
    with Image.open(path) as opened:
        # phones store a picture as the sensor saw it, and turn it by this tag
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, some of them in 32
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("values beyond 16 bits")
            # 257 = 65535 / 255, so that white stays white
            return np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
        if image.mode == "F":
            raise ValueError("floating-point values of unknown range")
        return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class _Files:
    """The pictures written for one image."""

    folder: Path
    name: str
    classes: ClassSet
    alpha: float

    def write(self, image: np.ndarray, label: np.ndarray, planes: np.ndarray | None) -> None:
        self._put(f"{self.name}.png", encode_label(label))
        # a palette picture: the indices are its pixels, and the colours only a table beside them
        color = Image.fromarray(label)
        color.putpalette(list(chain.from_iterable(self.classes.palette)))
        self._put(f"{self.name}_color.png", _encoded(color, "PNG"))
        mixed = overlay(image, label, self.classes, self.alpha)
        self._put(
            f"{self.name}_overlay.png", _encoded(Image.fromarray(mixed), "PNG", compress_level=3)
        )
        if planes is not None:
            for suffix, plane in zip(_class_suffixes(self.classes), planes, strict=True):
                self._put(f"{self.name}{suffix}", _encoded(Image.fromarray(plane), "PNG"))

    def _put(self, name: str, content: bytes) -> None:
        with published(self.folder / name) as partial:
            partial.write_bytes(content)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def image_probabilities(
    model: nn.Module, image: np.ndarray, options: PredictOptions
) -> torch.Tensor:
    """Class probabilities (C, H, W) float32 of an image (H, W, 3) uint8, in tiles if it is large.

    model: on options.device, in evaluation mode. Raises InputError for another form of image.
    """

    def at_once(part: np.ndarray) -> torch.Tensor:
        return probabilities(
            model,
            part,
            options.scales,
            options.horizontal_flip,
            device=options.device,
            autocast_dtype=options.autocast_dtype,
        )

    # whole where it fits: a window has less context at its edges
    if max(image.shape[:2]) <= options.max_px:
        return at_once(image)
    # multiples of 32, on which the cells of all windows fall together
    window_px = options.max_px // 32 * 32
    overlap_px = options.overlap_px or min(256, window_px // 128 * 32)
    return sliding_window(at_once, image, window_px, overlap_px)


def _check(images: Sequence[Path], pool: ThreadPoolExecutor) -> None:
    """Raise one InputError that names every image that cannot be read."""
    # all of them in one error: a user mends a folder once
    problems = [problem for problem in pool.map(_problem, images) if problem]
    if problems:
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if problems[20:] else ""
        )
        got = f"{len(problems)} of {len(images)} images cannot be read:\n  {shown}"
        raise InputError(
            got, "8-bit or 16-bit images that are whole", "replace or remove these files"
        )


def _problem(path: Path) -> str:
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                # reads the whole file, decodes 1/64 of it
                image.draft("L", (image.width // 8, image.height // 8))
                image.load()
                return ""
        # decoded whole: a PNG that is cut opens without an error
        load_image(path)
    except Exception as error:  # Pillow's plugins raise more kinds than they document
        return f"{path}: {error}"
    return ""


def _output_names(images: Sequence[Path], classes: ClassSet) -> list[str]:
    """One name per image, its stem where that is free.

    A.jpg, a.png -> a, a_png. No two ever share a file.
    """
    endings = [".png", "_color.png", "_overlay.png", *_class_suffixes(classes)]
    taken: set[str] = set()
    names = []
    for image in images:
        base = f"{image.stem}_{image.suffix.lower().lstrip('.')}"
        for name in (
            image.stem,
            base,
            *(f"{base}_{number}" for number in range(2, len(images) + 2)),
        ):
            # some file systems ignore case
            files = {(name + ending).casefold() for ending in endings}
            if not files & taken:
                break
        taken |= files
        names.append(name)
    return names


def _class_suffixes(classes: ClassSet) -> list[str]:
    """The ends of the probability pictures' names.

    The index keeps apart names that differ in signs only.
    """
    # class names may have slashes and spaces, which paths must not
    cleaned = [re.sub(r"[^\w-]+", "_", name) for name in classes.names]
    unique = len({name.casefold() for name in cleaned}) == len(cleaned)
    return [
        f"_prob_{name}.png" if unique else f"_prob_{i:03}_{name}.png"
        for i, name in enumerate(cleaned)
    ]


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[Path], np.ndarray], paths: Iterable[Path]
) -> Iterator[np.ndarray]:
    """The results of `read` in order, a few of them computed ahead."""
    waiting: deque[Future[np.ndarray]] = deque()
    for path in paths:
        # read while the network works, and no further ahead than memory allows
        waiting.append(pool.submit(read, path))
        if len(waiting) > _NUM_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
