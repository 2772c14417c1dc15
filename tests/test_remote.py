"""Shards behind a URL give the bytes of the local ones, whatever the network does, and each comes
once a machine.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import toy_samples

from distseg.config import loading
from distseg.data.plan import BlockPlan, Plan
from distseg.data.samples import SampleSet
from distseg.data.stream import TrainStream
from distseg.data.transforms import TrainView
from shards import cache, remote
from shards.errors import InputError
from shards.manifest import Manifest, ShardInfo
from shards.maps import write_maps
from shards.pack import pack
from shards.reader import RawSample, ShardReader
from shards.remote import Remote
from shards.remote_source import Prefetch, RemoteSource
from shards.sample import STANFORD
from shards.source import LocalSource
from shards.verified import check_verified

FILE = "train-000000.tar"
CHUNK = 4096  # several requests a shard


def needs(*modules: str) -> None:
    """Skip, with the reason, where an optional package is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


class Server:
    """Serves a folder over HTTP with ranges.

    `fault(name, nth request for it)` may say what goes wrong.
    """

    def __init__(self, folder: Path):
        self.requests: list[tuple[str, str | None]] = []  # (file, Range header)
        self.fault: Callable[[str, int], str] = lambda name, nth: ""
        self.pause, outer = 0.0, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    outer._answer(self, folder)

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, folder: Path) -> None:
        name, wanted = handler.path.lstrip("/"), handler.headers["Range"]
        self.requests.append((name, wanted))
        fault = self.fault(name, self.counts()[name])
        time.sleep(self.pause)
        if fault.isdigit() or not (folder / name).is_file():
            handler.send_error(int(fault or 404))
            return
        content = (folder / name).read_bytes()
        if fault == "damaged":
            content = bytes([content[0] ^ 1]) + content[1:]
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if found and fault != "no ranges":
            content = content[int(found[1]) : int(found[2]) + 1]
            handler.send_response(206)
        else:
            handler.send_response(200)
        if fault == "shorter":  # an honest header for half of the body
            content = content[: (len(content) + 1) // 2]
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(
            content if fault not in ("cut", "stall") else content[: len(content) // 2]
        )
        handler.wfile.flush()
        if fault == "stall":
            time.sleep(5)


@pytest.fixture
def server(toy_shards: Path) -> Iterator[Server]:
    needs("fsspec", "aiohttp")
    server = Server(toy_shards)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))


def read_all(location: str | Path, split: str = "train", **options) -> list[RawSample]:
    reader = ShardReader(location, split, **options)
    return [reader.read(index) for index in range(len(reader))]


def shards_of(folder: Path) -> tuple[ShardInfo, ...]:
    return Manifest.load(folder).splits["train"].shards


def num_chunks(folder: Path) -> dict[str, int]:
    return {shard.file: -(-shard.num_bytes // CHUNK) for shard in shards_of(folder)}


def tar_requests(server: Server) -> dict[str, int]:
    return {name: count for name, count in server.counts().items() if name.endswith(".tar")}


def test_the_samples_are_the_local_ones_and_come_once(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    expected = read_all(toy_shards)
    reader = ShardReader(server.url + "/", "train", cache_dir=str(tmp_path))
    assert not tar_requests(server)  # only manifest and indices at the start
    assert [reader.read(index) for index in range(8)] == expected
    assert tar_requests(server) == num_chunks(toy_shards)
    assert pickle.loads(pickle.dumps(reader)).read(5) == expected[5]
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    # the event loop stays behind; another one must start
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)
    context.Process(
        target=lambda: send.send([reader.read(index) for index in range(8)]), daemon=True
    ).start()
    assert receive.poll(20) and receive.recv() == expected
    server.requests.clear()
    assert read_all(server.url, cache_dir=str(tmp_path)) == expected
    assert server.counts() == {"manifest.json": 1}
    for tar in tmp_path.glob("*.tar"):  # the disk forgets a bit: such a copy comes anew
        content = bytearray(tar.read_bytes())
        content[900] ^= 1
        tar.write_bytes(content)
    assert read_all(server.url, cache_dir=str(tmp_path)) == expected


@pytest.mark.parametrize("fault", ["500", "429", "cut", "shorter", "stall", "damaged", "no ranges"])
def test_a_failing_server_is_outlasted(
    server: Server, toy_shards: Path, tmp_path: Path, fault: str
) -> None:
    server.fault = lambda name, nth: fault if nth in (1, 3) else ""
    # of files as small as the manifest, damage is an error and not tried again
    if fault == "damaged":
        server.fault = lambda name, nth: fault if name == FILE and nth == 1 else ""
    if fault == "shorter":
        server.fault = lambda name, nth: fault if name.endswith(".tar") and nth % 2 else ""
    assert read_all(server.url, cache_dir=str(tmp_path)) == read_all(toy_shards)
    if fault == "no ranges":
        # what came is not asked for again
        assert tar_requests(server) == dict.fromkeys(num_chunks(toy_shards), 1)


@pytest.mark.parametrize(
    ("fault", "expected", "attempts"),
    [
        ("503", r"503.*3 attempts", 3),
        ("stall", r"3 attempts.*0\.4 s between two bytes", 3),
        ("cut", r"3 attempts", 3),
        ("403", r"403", 1),
        ("404", r"^no http", 1),
    ],
)
def test_a_lost_server_is_one_error_that_names_the_url(
    server: Server, tmp_path: Path, fault: str, expected: str, attempts: int
) -> None:
    reader = ShardReader(server.url, "train", cache_dir=str(tmp_path))
    server.fault = lambda name, nth: fault
    with pytest.raises(InputError, match=f"(?s){expected}") as caught:
        reader.read(0)
    assert f"{server.url}/{FILE}" in caught.value.got
    assert tar_requests(server) == {FILE: attempts}
    server.fault = lambda name, nth: ""
    assert reader.read(0).key == "toy_00"  # nothing is spoiled by it


def test_a_server_that_is_gone_is_waited_for_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(remote, "SAID_PAUSE", 0.0)
    reader = ShardReader(server.url, "train", cache_dir=str(tmp_path))
    server.fault = lambda name, nth: "503"
    for number, attempts in enumerate((3, 1, 1)):  # not by each sample anew
        server.requests.clear()
        with pytest.raises(InputError, match=rf"503.*\({attempts} attempts?\)"):
            reader.read(number)
        assert tar_requests(server) == {FILE: attempts}
    assert "again in" in capsys.readouterr().err
    monkeypatch.setattr(remote, "GIVEN_UP_SECONDS", 0.0)
    with pytest.raises(InputError, match="3 attempts"):
        reader.read(0)


def test_damage_at_the_source_is_told_from_damage_on_the_way(
    server: Server, tmp_path: Path
) -> None:
    server.fault = lambda name, nth: "damaged" if name == FILE else ""
    with pytest.raises(InputError, match=rf"{FILE}: its sha256 .*3 times"):
        read_all(server.url, cache_dir=str(tmp_path))
    assert not list(tmp_path.glob("*.tar"))
    server.fault = lambda name, nth: "damaged" if name.endswith("index.json") else ""
    with pytest.raises(InputError, match=r"val-000000\.index\.json: its sha256"):
        ShardReader(server.url, "val", cache_dir=str(tmp_path))


def test_a_partial_download_is_gone_on_with(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    shard, content = shards_of(toy_shards)[0], (toy_shards / FILE).read_bytes()
    (tmp_path / f"{shard.sha256}.{shard.num_bytes}.partial").write_bytes(content[:5000])
    assert (
        ShardReader(server.url, "train", cache_dir=str(tmp_path)).read(0) == read_all(toy_shards)[0]
    )
    ranges = [wanted for name, wanted in server.requests if name == FILE]
    assert ranges[0].startswith("bytes=5000-") and len(ranges) == -(-(len(content) - 5000) // CHUNK)
    assert not list(tmp_path.glob("*.partial"))


def _read(url: str, folder: Path, ready, pipe) -> None:
    reader = ShardReader(url, "train", cache_dir=str(folder))
    ready.wait()
    pipe.send([reader.read(index) for index in range(8)])


def test_processes_that_start_together_fetch_each_shard_once(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    server.pause, context = 0.01, multiprocessing.get_context("fork")
    pipes, ready = [context.Pipe(False) for _ in range(4)], context.Barrier(4)
    processes = [
        context.Process(target=_read, args=(server.url, tmp_path, ready, send)) for _, send in pipes
    ]
    for process in processes:
        process.start()
    expected = read_all(toy_shards)
    assert all(receive.recv() == expected for receive, _ in pipes)
    for process in processes:
        process.join()
    assert tar_requests(server) == num_chunks(toy_shards)
    source, shard = RemoteSource(server.url, str(tmp_path)), shards_of(toy_shards)[0]
    # one that looked just before the other was done
    os.close(
        source._cache._fetched(shard, lambda descriptor: pytest.fail("fetched again"), lambda: None)
    )
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_downloader_leaves_what_the_next_one_goes_on_with(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    server.pause = 0.05
    process = context.Process(
        target=read_all, args=(server.url,), kwargs={"cache_dir": str(tmp_path)}
    )
    process.start()
    while server.counts()[FILE] < 3:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    [left] = tmp_path.glob("*.partial")
    assert not list(tmp_path.glob("*.tar")) and left.stat().st_size >= CHUNK
    server.requests.clear()
    server.pause = 0
    assert read_all(server.url, cache_dir=str(tmp_path)) == read_all(toy_shards)
    assert server.counts()[FILE] < num_chunks(toy_shards)[FILE]


def test_the_cache_is_bounded_and_keeps_what_is_being_read(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    shards = shards_of(toy_shards)
    room = sum(sorted(shard.num_bytes for shard in shards)[-2:]) + 10  # two of the three
    source = RemoteSource(server.url, str(tmp_path), room)
    used = []

    def files() -> set[str]:
        used.append(sum(path.stat().st_size for path in tmp_path.glob("*.tar")))
        return {shard.file for shard in shards if (tmp_path / f"{shard.sha256}.tar").exists()}

    with source.open(shards[0]) as descriptor:
        for shard in (*shards[1:], *shards[1:]):
            with source.open(shard):
                # the one that is read stays, old as it is
                assert files() == {shards[0].file, shard.file}
        assert os.pread(descriptor, 10, 0) == (toy_shards / FILE).read_bytes()[:10]
    with source.open(shards[0]):
        pass
    with source.open(shards[1]):
        assert files() == {shards[0].file, shards[1].file}  # the last one was used longest ago
    assert max(used) <= room
    expected = read_all(toy_shards)
    assert [read_all(server.url, cache_dir=str(tmp_path), cache_bytes=room)] == [expected]
    small = RemoteSource(server.url, str(tmp_path), 1000)
    with (
        pytest.raises(InputError, match=r"(?s)0\.0 MB in the cache.*data\.cache_bytes"),
        small.open(shards[0]),
    ):
        pass


def test_a_download_is_heard_of_as_it_comes_also_by_who_waits_for_another(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    server.pause, shard = 0.05, shards_of(toy_shards)[0]
    sources = [RemoteSource(server.url, str(tmp_path)) for _ in range(2)]
    heard: list[list[float]] = [[], []]

    def fetch(number: int) -> None:
        sources[number].tell(lambda: heard[number].append(time.monotonic()))
        with sources[number].open(shard) as descriptor:
            assert os.fstat(descriptor).st_size == shard.num_bytes

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    chunks = -(-shard.num_bytes // CHUNK)
    assert sorted(map(len, heard))[1] == chunks  # the one that fetched
    assert len(min(heard, key=len)) >= 3  # the other, which only looked now and then
    assert server.counts()[shard.file] == chunks


def test_readers_that_fight_for_a_small_cache_still_get_the_right_bytes(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    room = max(shard.num_bytes for shard in shards_of(toy_shards)) + 10_000  # one, and the indices
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        options = {"cache_dir": str(tmp_path), "cache_bytes": room}
        jobs = [pool.apply_async(read_all, (server.url,), options) for _ in range(3)]
        expected = read_all(toy_shards)
        assert all(job.get(60) == expected for job in jobs)


def test_shards_come_before_they_are_needed_in_their_order(
    server: Server, toy_shards: Path, tmp_path: Path
) -> None:
    reader, local = (
        ShardReader(where, "train", cache_dir=str(tmp_path)) for where in (server.url, toy_shards)
    )
    streams = [
        TrainStream(
            SampleSet(r),
            Plan(8, 1),
            TrainView(48, 0.5, 1.5),
            batch_size=2,
            rank=0,
            world_size=1,
            num_threads=1,
        )
        for r in (reader, local)
    ]
    first = [next(stream) for stream in streams]
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tar_requests(server) == num_chunks(toy_shards)  # all, after one batch
    assert bytes(first[0].image.numpy()) == bytes(first[1].image.numpy())
    [stream.close() for stream in streams]


@pytest.mark.parametrize("per_block", [0, 1])
def test_blocks_fetch_a_shard_once_an_epoch_into_a_cache_that_holds_a_quarter(
    tmp_path: Path, per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight shards of five samples and room for two and a half.

    All samples shuffled together need far more.
    """
    needs("fsspec", "aiohttp")
    # requests are counted: on a busy machine none may be given up and made again
    monkeypatch.setattr(remote, "STALL_SECONDS", 60.0)
    samples = [
        replace(toy, key=f"{toy.key}_{i}", split="train")
        for i in range(4)
        for toy in toy_samples()[:10]
    ]
    write_maps(tmp_path / "maps.h5", "many", STANFORD, samples, len(samples))
    shards = pack(tmp_path / "maps.h5", tmp_path / "shards", samples_per_shard=5).shards()
    index_bytes = sum((tmp_path / "shards" / shard.index_file).stat().st_size for shard in shards)
    room = int(2.5 * max(shard.num_bytes for shard in shards)) + index_bytes
    server = Server(tmp_path / "shards")
    reader = ShardReader(server.url, "train", cache_dir=str(tmp_path / "cache"), cache_bytes=room)
    plan = BlockPlan(reader.shard_sizes, per_block, 1) if per_block else Plan(40, 1)
    options = {"batch_size": 5, "rank": 0, "world_size": 1, "num_threads": 1}
    stream = TrainStream(SampleSet(reader), plan, TrainView(48), **options)
    for _ in range(16):  # two epochs
        next(stream)
    stream.close()
    server.close()
    fetched = sum(tar_requests(server).values()) / sum(num_chunks(tmp_path / "shards").values())
    # times each shard; batches ahead count too
    assert (fetched <= 2.8) if per_block else (fetched > 4)


def test_what_a_reader_was_faster_with_is_not_brought_again() -> None:
    begun, gate = [], threading.Event()
    shards = [ShardInfo(f"{i}.tar", 1, 10, f"{i:064d}", "") for i in range(6)]
    ahead = Prefetch(lambda shard: (begun.append(shard), gate.wait(10)), max_bytes=60)
    ahead.expect(shards)  # four are under way, two wait for a thread
    while len(begun) < 4:
        time.sleep(0.001)
    ahead.used(shards[4])
    gate.set()
    while shards[5] not in begun:
        time.sleep(0.001)
    assert shards[4] not in begun


def test_what_is_expected_is_fetched_once_for_each_use_and_never_too_far_ahead() -> None:
    begun, gate = [], threading.Event()
    shards = [ShardInfo(f"{i}.tar", 1, 10, f"{i:064d}", "") for i in range(40)]
    ahead = Prefetch(lambda shard: (begun.append(shard), gate.wait(10)), max_bytes=50)
    ahead.expect(shards[:20])
    ahead.expect(shards)  # told twice
    gate.set()
    for count in range(5, 41):
        while len(begun) < min(count, 40):
            time.sleep(0.001)
        time.sleep(0.002)
        assert len(begun) == min(count, 40)  # never more than 50 bytes ahead
        ahead.used(shards[count - 5])
    assert sorted(begun, key=shards.index) == shards


@pytest.mark.parametrize(
    "url",
    ["https://me:hunter2@host/x", "https://host/x?sig=hunter2", "ftp://hunter2/x", "s3:///hunter"],
)
def test_urls_with_secrets_or_unknown_schemes_are_refused_early(url: str) -> None:
    with pytest.raises(InputError) as caught:
        loading.load([f"data.shards={url}"])
    assert "hunter2" not in str(caught.value)


def test_no_message_repeats_what_a_redirect_carried() -> None:
    for text in (
        "403, url='https://host/a?X-Amz-Signature=hunter2'",
        "at http://u:hunter2@proxy:1/ (x)",
    ):
        assert "hunter2" not in remote.described(OSError(text))


@pytest.mark.parametrize("fault", ["403", "404"])
def test_a_forbidden_record_may_be_a_missing_one(
    server: Server, tmp_path: Path, fault: str
) -> None:
    reader = ShardReader(server.url, "train", cache_dir=str(tmp_path))
    server.fault = lambda name, nth: fault if name == "verified.json" else ""
    expected = (
        "verified.json.*may not list the bucket"
        if fault == "403"
        else "shards that were not verified"
    )
    with pytest.raises(InputError, match=expected):
        check_verified(reader)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PACKAGES", {"gs": ("no_such_module", "gcs")})
    with pytest.raises(InputError, match=r"pip install -e '.\[gcs\]'"):
        Remote("gs://bucket/folder")


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(cache.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"(?s)flock.*data\.cache_dir"):
        cache.ShardCache(tmp_path)


def test_a_manifest_cannot_name_files_outside_the_cache(toy_shards: Path, tmp_path: Path) -> None:
    shard = ShardInfo("x.tar", 1, 1, "../" * 20 + "tmp/x", "")
    with pytest.raises(InputError, match="sha256"):
        cache.ShardCache(tmp_path).has(shard)


def test_room_that_a_download_has_reserved_is_not_counted_as_more_disk(tmp_path: Path) -> None:
    one, before = cache.ShardCache(tmp_path), cache.ShardCache(tmp_path).limit()
    (tmp_path / f"{64 * 'a'}.{10**15}.partial").write_bytes(bytes(1000))
    assert one.limit() < before + 10**12


def test_few_shards_stay_open(toy_shards: Path) -> None:
    source, shards = LocalSource(toy_shards, max_open=2), shards_of(toy_shards)
    before = len(os.listdir("/proc/self/fd"))
    for shard in shards * 3:
        with source.open(shard), source.open(shards[0]) as descriptor:
            assert os.pread(descriptor, 10, 0) == (toy_shards / FILE).read_bytes()[:10]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    with source.open(shards[0]), source.open(shards[1]), source.open(shards[2]) as descriptor:
        assert os.pread(descriptor, 10, 0)  # more than two only while they are all in use


def test_s3_gives_the_same_samples(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("s3fs", "moto", "flask", "flask_cors")
    import boto3
    from moto.server import ThreadedMotoServer

    monkeypatch.setattr(remote, "STALL_SECONDS", 10.0)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for key, value in {
            "ACCESS_KEY_ID": "me",
            "SECRET_ACCESS_KEY": "hunter2",
            "ENDPOINT_URL": url,
        }.items():
            monkeypatch.setenv(f"AWS_{key}", value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="shards")
        for path in toy_shards.iterdir():
            client.upload_file(str(path), "shards", f"toy/{path.name}")
        for split in ("train", "val"):
            assert read_all("s3://shards/toy", split, cache_dir=str(tmp_path)) == read_all(
                toy_shards, split
            )
        with pytest.raises(InputError, match=r"no s3://shards/none/manifest\.json") as caught:
            ShardReader("s3://shards/none", "train", cache_dir=str(tmp_path))
        assert "hunter2" not in str(caught.value)
    finally:
        server.stop()
