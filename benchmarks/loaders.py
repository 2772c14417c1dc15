"""What other systems do to read and augment segmentation data, written anew from their
documentation, for comparison.

Each does the work of its system's usual configuration, without colour jitter, with the decoder that
it uses.
"""

from __future__ import annotations

import io
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image

from distseg.data.transforms import TrainView
from shards.reader import ShardReader
from shards.sample import decode_image, decode_label

SIDE, SCALES = 321, (0.5, 1.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of masks: only its presence matters
PALETTE = np.random.default_rng(0).integers(0, 256, 768).tolist()
Files = list[tuple[Path, Path]]


def packed_folder(reader: ShardReader, folder: Path) -> Files:
    """The samples as files.

    The JPEG and, as VOC has them, a palette PNG as Pillow writes it by default.
    """
    folder.mkdir()
    files = []
    for index in range(len(reader)):
        raw = reader.read(index)
        image, mask = folder / f"{raw.key}.jpg", folder / f"{raw.key}.png"
        image.write_bytes(raw.image)
        label = decode_label(raw.label or b"")
        picture = Image.frombytes("P", label.shape[::-1], label.tobytes())
        picture.putpalette(PALETTE)
        picture.save(mask)
        files.append((image, mask))
    return files


class FolderPil(torch.utils.data.Dataset):
    """In the style of torchvision's segmentation references.

    Pillow images, then a normalised float tensor.
    """

    def __init__(self, files: Files):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = (Image.open(path) for path in self._files[index])
        image = image.convert("RGB")
        scale = random.uniform(*SCALES)
        size = round(image.width * scale), round(image.height * scale)
        image, mask = (
            image.resize(size, Image.Resampling.BILINEAR),
            mask.resize(size, Image.Resampling.NEAREST),
        )
        if random.random() < 0.5:
            image, mask = (it.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for it in (image, mask))
        wide, high = max(SIDE, image.width), max(SIDE, image.height)
        left, top = random.randint(0, wide - SIDE), random.randint(0, high - SIDE)
        box = (left, top, left + SIDE, top + SIDE)
        image = _padded(image, wide, high, 0).crop(box)
        mask = _padded(mask, wide, high, 255).crop(box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return pixels.sub_(mean).div_(std), torch.from_numpy(np.array(mask, np.int64))


def _padded(image: Image.Image, width: int, height: int, fill: int) -> Image.Image:
    if image.size == (width, height):
        return image
    padded = Image.new(image.mode, (width, height), fill if image.mode == "P" else (fill,) * 3)
    padded.paste(image, (0, 0))
    return padded


class FolderCv2(torch.utils.data.Dataset):
    """In the style of mmsegmentation 0.x.

    OpenCV arrays, crops of at most 75 % one class, normalised, then padded.
    """

    def __init__(self, files: Files):
        cv2.setNumThreads(0)
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, mask_path = self._files[index]
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        mask = np.array(Image.open(io.BytesIO(mask_path.read_bytes())))
        scale = random.uniform(*SCALES)
        size = round(mask.shape[1] * scale), round(mask.shape[0] * scale)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        for _ in range(10):
            top, left = (random.randint(0, max(side - SIDE, 0)) for side in mask.shape)
            part = slice(top, top + SIDE), slice(left, left + SIDE)
            classes, counts = np.unique(mask[part], return_counts=True)
            counts = counts[classes != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        image, mask = image[part], mask[part]
        if random.random() < 0.5:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
        pixels = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2RGB)
        mean, std = (255 * np.float64(values).reshape(1, 3) for values in (MEAN, STD))
        cv2.subtract(pixels, mean.repeat(1, 0), pixels)
        cv2.multiply(pixels, 1 / std, pixels)
        room = 0, SIDE - mask.shape[0], 0, SIDE - mask.shape[1]
        pixels = cv2.copyMakeBorder(pixels, *room, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        mask = cv2.copyMakeBorder(mask, *room, cv2.BORDER_CONSTANT, value=255)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(
            mask.astype(np.int64)
        )


def webdataset_loader(tars: list[Path], batch: int, num_workers: int) -> Iterator[Any]:
    """webdataset's own pipeline and loader, shuffled, with our decoders and our view.

    The same uint8 batches.
    """
    cv2.setNumThreads(0)
    view = TrainView(SIDE, *SCALES)

    def viewed(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        image, label = np.empty((SIDE, SIDE, 3), np.uint8), np.empty((SIDE, SIDE), np.uint8)
        view(
            decode_image(sample["jpg"]),
            decode_label(sample["png"]),
            np.random.default_rng(),
            image,
            label,
        )
        return image, label

    paths = [str(path) for path in tars]
    data = (
        webdataset.WebDataset(paths, shardshuffle=len(paths))
        .repeat()
        .shuffle(1000)
        .map(viewed)
        .batched(batch)
    )
    yield from webdataset.WebLoader(data, batch_size=None, num_workers=num_workers)


def decoded_only(reader: ShardReader, num_threads: int, batch: int) -> Iterator[None]:
    """The floor: each image decoded from memory, in threads, and thrown away."""
    images = [reader.read(index).image for index in range(len(reader))]
    place = 0
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Any] = deque()
        while True:
            while len(pending) < 4 * batch:
                pending.append(pool.submit(_decode, images[place % len(images)]))
                place += 1
            for _ in range(batch):
                pending.popleft().result()
            yield None


def _decode(image: bytes) -> None:
    simplejpeg.decode_jpeg(image, colorspace="RGB")
