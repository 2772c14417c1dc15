"""Training views a second: our stream beside what others do with the same images, and how close to
decoding alone.

"Ours" decodes each sample anew for each view, as all others do; "decoded before" finds them in
memory, as one rank does from its second epoch on where data.keep_decoded_bytes has room for all.
Every system gives random scales of 0.5 to 1.5, crops of 321 pixels and horizontal flips, in batches
of 16, with two workers; none changes colours. The systems take turns, each anew, and are timed once
their queues are in a steady state. "CPU" is processor time a view of this process and its workers:
the figure to trust on a machine that does other work. Run: python -m benchmarks.data [SHARDS of
images like VOC's] [--rounds 5] [--seconds 1.5]
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader

from benchmarks.loaders import (
    SCALES,
    SIDE,
    FolderCv2,
    FolderPil,
    decoded_only,
    packed_folder,
    webdataset_loader,
)
from distseg.data.plan import Plan
from distseg.data.samples import SampleSet
from distseg.data.stream import TrainStream
from distseg.data.transforms import TrainView
from shards.maps import MapsReader, write_maps
from shards.pack import pack
from shards.reader import ShardReader
from shards.sample import STANFORD, Sample, decode_label

BATCH, WORKERS = 16, 2
WARM_UP = 12  # batches: more than any of the systems keeps ready
EPOCHS = 20
TICKS = os.sysconf("SC_CLK_TCK")
AIMS = {"folder, PIL": 6.0, "folder, OpenCV": 4.5, "webdataset": 1.9, "decoding only": 0.75}


def synthetic(count: int) -> list[Sample]:
    """Pictures with the size, the detail and so the bytes of VOC's: 375 x 500 px, about 46 kB."""
    samples = []
    for index in range(count):
        rng = np.random.default_rng(index)
        octaves = [
            rng.normal(size=(3 * 2**k, 4 * 2**k, 3)).astype(np.float32) / 1.6**k for k in range(7)
        ]
        field = sum(
            cv2.resize(octave, (500, 375), interpolation=cv2.INTER_CUBIC) for octave in octaves
        )
        image = (128 + 40 * np.asarray(field)).clip(0, 255).astype(np.uint8)
        coarse = cv2.resize(
            octaves[1][..., 0] + octaves[1][..., 1], (500, 375), interpolation=cv2.INTER_CUBIC
        )
        label = np.digitize(coarse, [-1.5, -0.5, 0.5, 1.5]).astype(np.uint8)
        label[:, :4], label[:4] = 255, 255
        jpeg = simplejpeg.encode_jpeg(image, quality=88)
        samples.append(Sample(f"synthetic_{index:04d}", jpeg, label, "train", source_id=str(index)))
    return samples


def stream(samples: SampleSet, worker_type: str = "thread", seed: int = 0) -> TrainStream:
    """Ours, on one rank."""
    view = TrainView(SIDE, *SCALES)
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "rank": 0,
        "world_size": 1,
        "num_threads": WORKERS,
    }
    return TrainStream(samples, Plan(len(samples), seed), view, worker_type=worker_type, **options)


def decoded(reader: ShardReader) -> SampleSet:
    """All samples, in memory."""
    samples = SampleSet(reader, keep_decoded_bytes=math.inf)
    for index in range(len(samples)):
        samples.peek(index)
    return samples


def ours(samples: SampleSet, worker_type: str = "thread", as_float: bool = False) -> Iterator[Any]:
    """Batches of our stream.

    As_float: divided by 255 on this CPU, which training leaves to its device.
    """
    with closing(stream(samples, worker_type)) as source:
        for batch in source:
            yield batch.image.float().div_(255) if as_float else batch


def loaded(dataset: Any) -> Iterator[Any]:
    """Batches of a folder, by torch's loader, as those systems set it up."""
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    yield from DataLoader(dataset, BATCH, sampler=endless, num_workers=WORKERS)


def cpu_seconds() -> float:
    """Processor time of this process and its children so far."""
    mine, total = os.getpid(), 0
    for folder in Path("/proc").iterdir():
        try:
            values = (
                (folder / "stat").read_text().rpartition(")")[2].split()
                if folder.name.isdigit()
                else None
            )
        except OSError:
            continue
        if values and mine in (int(folder.name), int(values[1])):
            total += int(values[11]) + int(values[12])
    return total / TICKS


def timed(batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """(seconds, processor seconds) a view, in the steady state, over at least so many seconds."""
    for _ in range(WARM_UP):
        next(batches)
    begun, cpu, views = time.perf_counter(), cpu_seconds(), 0
    # at least one: on a busy host a short time may be up before the first
    while not views or time.perf_counter() - begun < seconds:
        next(batches)
        views += BATCH
    result = (time.perf_counter() - begun) / views, (cpu_seconds() - cpu) / views
    batches.close()  # type: ignore[attr-defined]  # all are generators
    return result


def compare(systems: dict[str, Callable[[], Iterator[Any]]], rounds: int, seconds: float) -> None:
    """Print each system's rates, and those of ours as multiples of them, pair by pair."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, begin in systems.items():
            wall, cpu = timed(begin(), seconds)
            found[name].append((wall, cpu))
            print(f"  {name}: {1 / wall:.0f} views/s, {cpu * 1e6:.0f} us CPU", flush=True)
    heads = f"{'':24}{'views/s':>9}{'CPU us':>9}{'ours / it':>11}"
    print(f"{heads}{'by CPU':>9}{'decoded / it':>14}{'aim':>6}")
    for name, rows in found.items():
        wall, cpu = (statistics.median(row[place] for row in rows) for place in (0, 1))
        by_wall, by_cpu, kept = (
            statistics.median(
                row[place] / own[place] for row, own in zip(rows, found[of], strict=True)
            )
            for of, place in (("ours", 0), ("ours", 1), ("ours, decoded before", 0))
        )
        aim = f"{AIMS[name]:.2f}" if name in AIMS else ""
        rates = f"{name:24}{1 / wall:>9.0f}{cpu * 1e6:>9.0f}"
        print(f"{rates}{by_wall:>11.2f}{by_cpu:>9.2f}{kept:>14.2f}{aim:>6}")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(reader: ShardReader) -> None:
    """Print the memory of this process over many epochs of at most 320 samples.

    Once a third of them stays decoded.
    """
    for keep in (0.0, SampleSet(reader).decoded_bytes(math.inf) / 3):
        source, sizes = stream(SampleSet(reader, keep_decoded_bytes=keep)), []
        steps = min(len(reader), 320) // BATCH
        for _ in range(EPOCHS):
            for _ in range(steps):
                next(source)
            sizes.append(resident_mb())
        source.close()
        last = max(sizes[EPOCHS // 2 :]) - max(sizes[: EPOCHS // 2])
        epochs = (
            f"{sizes[1]:.0f} MB after 2 epochs, {sizes[-1]:.0f} after {EPOCHS}; "
            f"second half {last:+.1f} MB"
        )
        print(f"memory, with at most {keep / 1e6:.0f} MB of decoded samples: {epochs}", flush=True)


def measure_start(location: Path) -> None:
    """Print the time from nothing open to the first batch."""
    seconds = []
    for seed in range(5):
        begun = time.perf_counter()
        with closing(stream(SampleSet(ShardReader(location, "train")), seed=seed)) as source:
            next(source)
        seconds.append(time.perf_counter() - begun)
    print(f"first batch after {statistics.median(seconds) * 1e3:.0f} ms")


def measure_maps(reader: ShardReader, folder: Path) -> None:
    """Print how fast maps are read, and packed into shards."""
    raws = [reader.read(index) for index in range(min(len(reader), 256))]
    samples = [
        Sample(raw.key, raw.image, decode_label(raw.label or b""), "train", raw.key) for raw in raws
    ]
    write_maps(folder / "maps.h5", "benchmark", reader.classes, samples, len(samples))
    with MapsReader(folder / "maps.h5") as maps:
        order = np.random.default_rng(0).permutation(maps.splits["train"]).tolist()
        begun, cpu = time.perf_counter(), time.process_time()
        for key in order:
            maps.read(key)
        wall, busy = time.perf_counter() - begun, time.process_time() - cpu
    print(
        f"HDF5 maps, random reads: {len(order) / wall:.0f} samples/s, "
        f"{busy / len(order) * 1e6:.0f} us CPU each"
    )
    begun, cpu = time.perf_counter(), time.process_time()
    pack(folder / "maps.h5", folder / "again")
    wall, busy = time.perf_counter() - begun, time.process_time() - cpu
    print(
        f"packing, one process: {len(order) / wall:.0f} samples/s, "
        f"{busy / len(order) * 1e6:.0f} us CPU each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shards", nargs="?", type=Path, help="packed shards with a split train; else synthetic ones"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="that each is timed in each turn"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # as distseg.train does
    with tempfile.TemporaryDirectory() as temporary:
        folder, location = Path(temporary), options.shards
        if location is None:
            location = folder / "shards"
            samples = synthetic(128)
            write_maps(folder / "synthetic.h5", "synthetic", STANFORD, samples, len(samples))
            pack(folder / "synthetic.h5", location, samples_per_shard=32)
        reader = ShardReader(location, "train")
        files = packed_folder(reader, folder / "files")
        print(
            f"{len(reader)} images, "
            f"{sum(file.stat().st_size for file, _ in files) / len(files) / 1e3:.1f} kB each"
        )
        tars = [location / shard.file for shard in reader.manifest.splits["train"].shards]
        measure_memory(reader)  # first, while nothing else is held
        anew, before = SampleSet(reader), decoded(reader)
        systems: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": lambda: ours(anew),
            "ours, decoded before": lambda: ours(before),
            "decoding only": lambda: decoded_only(reader, WORKERS, BATCH),
            "webdataset": lambda: webdataset_loader(tars, BATCH, WORKERS),
            "folder, OpenCV": lambda: loaded(FolderCv2(files)),
            "folder, PIL": lambda: loaded(FolderPil(files)),
            "ours, as floats": lambda: ours(anew, as_float=True),
            "ours, processes": lambda: ours(anew, "process"),
        }
        compare(systems, options.rounds, options.seconds)
        measure_start(location)
        measure_maps(reader, folder)


if __name__ == "__main__":
    main()
