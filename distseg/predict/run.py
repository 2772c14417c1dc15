"""Label images with a trained segmentor.

Class indices, colours, an overlay, and probabilities on request.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from distseg.config.schema import Config
from distseg.evaluate.inference import probabilities, window_blocks
from distseg.tracking.figures import occurring, overlay
from distseg.tracking.legend import with_legend
from distseg.tracking.palettes import coloured
from shards.errors import InputError
from shards.files import nearest_existing, published, say, tracked
from shards.image_files import images_below
from shards.images import READ, load_rgb, num_pixels
from shards.names import shortened
from shards.sample import ClassSet, encode_label
from shards.words import counted

CLASSES_FILE = "classes.json"
MAX_PX = 2048  # larger images take a sliding window, as their maps would take gigabytes
_NUM_THREADS = 4  # read and write pictures while the network works
# pictures in memory on either side of the network: at most so many, and so many pixels of them
# (192 MiB); one that is larger is alone
_NUM_AHEAD = 8
_AHEAD_PX = 2**26
_STRIP_PX = 2**22


@dataclass(frozen=True)
class PredictOptions:
    """How images are looked at and what is written.

    probabilities: also one picture per class. scales, horizontal_flip: test-time augmentation (see
    `inference`). max_px: an image with a longer side is labelled by a sliding window of this side,
    whose places overlap by overlap_px (0: by 256 or less). overlay_alpha: opacity of the class
    colours in [0, 1]. legend: below each overlay the names of the classes that it shows.
    autocast_dtype: None for the model's own precision.
    """

    probabilities: bool = False
    scales: tuple[float, ...] = (1.0,)
    horizontal_flip: bool = False
    max_px: int = MAX_PX
    overlap_px: int = 0
    overlay_alpha: float = 0.5
    legend: bool = True
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
    classes = coloured(trained_classes(found), config.evaluate.palette)
    predict(model, paths, out, classes, of_run(options, config, where))
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
    """The image itself, or those directly in a folder, by name; says what was passed over.

    Raises InputError where there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist", "an image or a folder of images", "check the path"
        )
    # not into subfolders: results lie in one folder, where names would collide
    listing = images_below(path, subfolders=False)
    if not listing.files:
        # the usual mistake is one folder too high, so the error names the right one
        deeper = next((image.parent for image in images_below(path).files), None)
        action = f"name the folder itself, for example {deeper}" if deeper else "check the path"
        raise InputError(f"no image in {path}", f"images: {READ}", action)
    for note in listing.notes():
        say(f"note: {note}")
    return listing.files


def predict(
    model: nn.Module, images: list[Path], out: Path, classes: ClassSet, options: PredictOptions
) -> list[Path]:
    """Write the label of every image into the folder `out`, and print the speed.

    model: a segmentor; moved to options.device and set to evaluation mode. Per image, at its size
    and turned upright as its EXIF orientation says: NAME.png (class indices, 8-bit gray),
    NAME_color.png (the same with the palette), NAME_overlay.png (with options.legend a strip more
    below), and with options.probabilities NAME_prob_CLASS.png (gray, 255 = 1); classes.json names
    the indices. Returns the paths of the index pictures, in the order of `images`. Raises
    InputError that lists the images that cannot be read, when all others are done.
    """
    _check_fits(model, images, out, classes)
    names = _output_names(images, classes, _longest_name(out))
    started = time.perf_counter()
    bad: list[InputError] = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        model = model.to(options.device).eval()
        # threads, not processes: decoders let go of the GIL, and a picture need not be copied to a
        # process
        pictures = tracked(_ahead(pool, images), len(images), "predicting")
        written = _Written()
        for name, image in zip(names, pictures, strict=True):
            if isinstance(image, InputError):
                bad.append(image)
                continue
            label, planes = _labelled(model, image, options)
            files = _Files(out, name, classes, options)
            written.add(pool.submit(files.write, image, label, planes), label.size)
        written.wait()
    if len(bad) < len(images):
        # last: a folder that has it is complete
        _write_classes(out / CLASSES_FILE, classes)
        took = _speed(len(images) - len(bad), time.perf_counter() - started)
        print(f"{took}, reading and writing included: {out}")
    if bad:
        raise _unreadable(bad, len(images), out)
    return [out / f"{name}.png" for name in names]


def _labelled(
    model: nn.Module, image: np.ndarray, options: PredictOptions
) -> tuple[np.ndarray, np.ndarray | None]:
    """((H, W) uint8 class indices, (C, H, W) uint8 probabilities where asked for, 255 = 1)."""
    label = np.empty(image.shape[:2], np.uint8)
    planes: np.ndarray | None = None
    for rows, columns, block in _blocks(model, image, options):
        label[rows, columns] = block.argmax(0).to(torch.uint8).cpu().numpy()
        if options.probabilities:
            if planes is None:
                planes = np.empty((len(block), *label.shape), np.uint8)
            planes[:, rows, columns] = _as_bytes(block)
    return label, planes


def _unreadable(bad: Sequence[InputError], count: int, out: Path) -> InputError:
    """One error that names every image that could not be read."""
    # all of them in one error: a user mends a folder once
    shown = "\n  ".join(error.got for error in bad[:20])
    more = f"\n  and {len(bad) - 20} more" if bad[20:] else ""
    done = f"; the others are in {out}" if len(bad) < count else ""
    got = f"{len(bad)} of {count} images cannot be read{done}:\n  {shown}{more}"
    return InputError(got, f"whole images of 8 or 16 bits: {READ}", "replace or remove these files")


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
    return f"{counted(count, 'image')} in {seconds:.1f} s ({each})"


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


@dataclass(frozen=True)
class _Files:
    """The pictures written for one image."""

    folder: Path
    name: str
    classes: ClassSet
    options: PredictOptions

    def write(self, image: np.ndarray, label: np.ndarray, planes: np.ndarray | None) -> None:
        self._put(f"{self.name}.png", encode_label(label))
        # a palette picture: the indices are its pixels, and the colours only a table beside them
        color = Image.fromarray(label)
        color.putpalette(list(chain.from_iterable(self.classes.palette)))
        self._put(f"{self.name}_color.png", _encoded(color, "PNG"))
        mixed = np.empty_like(image)
        # in strips, since it is computed in floating point
        rows = max(1, _STRIP_PX // max(1, label.shape[1]))
        for top in range(0, len(label), rows):
            strip = slice(top, top + rows)
            mixed[strip] = overlay(
                image[strip], label[strip], self.classes, self.options.overlay_alpha
            )
        if self.options.legend:
            mixed = with_legend(mixed, self.classes, occurring(label, self.classes))
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
    result: torch.Tensor | None = None
    for rows, columns, block in _blocks(model, image, options):
        if block.shape[1:] == image.shape[:2]:
            return block  # where it was computed
        if result is None:
            result = torch.empty(len(block), *image.shape[:2])
        result[:, rows, columns] = block
    if result is None:
        raise InputError(f"an image of shape {image.shape}", "at least a pixel", "give another")
    return result


def _blocks(
    model: nn.Module, image: np.ndarray, options: PredictOptions
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, probabilities (C, h, w) float32), one after the other; small images whole."""

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
    # one of another form too, which is refused there
    if image.ndim != 3 or max(image.shape[:2]) <= options.max_px:
        yield slice(None), slice(None), at_once(image)
        return
    # multiples of 32, on which the cells of all windows fall together
    window_px = options.max_px // 32 * 32
    overlap_px = options.overlap_px or min(256, window_px // 128 * 32)
    yield from window_blocks(at_once, image, window_px, overlap_px)


def _longest_name(out: Path) -> int:
    """Bytes that a name in this folder may have."""
    try:
        return os.pathconf(nearest_existing(out), "PC_NAME_MAX")
    except (OSError, ValueError):  # a file system that does not say
        return 255


def _output_names(images: Sequence[Path], classes: ClassSet, longest: int = 255) -> list[str]:
    """One name per image, its stem where that is free.

    A.jpg, a.png -> a, a_png. No two ever share a file. longest: bytes that a file's name may have;
    a stem that leaves too little for what is put behind it is cut, and ends in digits of its hash.
    """
    endings = [".png", "_color.png", "_overlay.png", *_class_suffixes(classes)]
    room = longest - max(len(os.fsencode(ending)) for ending in endings)
    taken: set[str] = set()
    names = []
    for image in images:
        base = f"{image.stem}_{image.suffix.lower().lstrip('.')}"
        for name in (
            image.stem,
            base,
            *(f"{base}_{number}" for number in range(2, len(images) + 2)),
        ):
            name = shortened(name, room)
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
    # class names may have slashes and spaces, which paths must not, and be long
    cleaned = [shortened(re.sub(r"[^\w-]+", "_", name), 80) for name in classes.names]
    unique = len({name.casefold() for name in cleaned}) == len(cleaned)
    return [
        f"_prob_{name}.png" if unique else f"_prob_{i:03}_{name}.png"
        for i, name in enumerate(cleaned)
    ]


def _ahead(pool: ThreadPoolExecutor, paths: Iterable[Path]) -> Iterator[np.ndarray | InputError]:
    """The images in order, a few of them read ahead; for one that cannot be read, why."""
    waiting: deque[tuple[Future[np.ndarray | InputError], int]] = deque()
    for path in paths:
        num_px = num_pixels(path)
        # read while the network works, and no further ahead than memory allows
        while waiting and not _fits(waiting, num_px):
            yield waiting.popleft()[0].result()
        waiting.append((pool.submit(_read, path), num_px))
    while waiting:
        yield waiting.popleft()[0].result()


def _fits(waiting: Iterable[tuple[Any, int]], num_px: int) -> bool:
    """Whether a picture may join those that wait."""
    sizes = [size for _, size in waiting]
    return len(sizes) < _NUM_AHEAD and sum(sizes) + num_px <= _AHEAD_PX


def _read(path: Path) -> np.ndarray | InputError:
    try:
        return load_rgb(path)
    except InputError as error:
        return error


class _Written:
    """Pictures that wait to be written, or are being written."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def add(self, future: Future[None], num_px: int) -> None:
        """One more; waits for earlier ones where they would fill the memory of a slow disk."""
        while self._waiting and not _fits(self._waiting, num_px):
            self._waiting.popleft()[0].result()
        self._waiting.append((future, num_px))

    def wait(self) -> None:
        """For all of them, and raise the errors of writing."""
        # an exception in a pool is silent until it is asked for
        while self._waiting:
            self._waiting.popleft()[0].result()
