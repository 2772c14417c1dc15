"""Rules of how a job runs: evaluation, ranks, profile and copies."""

from __future__ import annotations

import re
from pathlib import Path

from distseg.config.schema import Config
from shards.errors import InputError
from shards.remote import PACKAGES, check_plain


def a_scale_to_evaluate_at(config: Config) -> None:
    """Test-time augmentation averages over one scale or more."""
    # an empty list is within every bound
    if not config.evaluate.scales:
        action = "write for example evaluate.scales=[0.75,1,1.25]"
        raise InputError("evaluate.scales=[]", "at least one scale", action)


def windows_that_fit(config: Config) -> None:
    """A sliding window and its overlap are multiples of 32, and neighbours only overlap."""
    window_px, overlap_px = config.evaluate.window_px, config.evaluate.overlap_px
    # every built-in encoder's stride divides 32: so windows begin on its grid
    if window_px and (window_px % 32 or overlap_px % 32 or 2 * overlap_px > window_px):
        got = f"evaluate.window_px={window_px} with evaluate.overlap_px={overlap_px}"
        needed = "multiples of 32, the overlap at most half the window"
        action = "write for example evaluate.window_px=512 evaluate.overlap_px=128"
        raise InputError(got, needed, action)


def subsets_by_name(config: Config) -> None:
    """evaluate.subsets has a list of class names for each subset."""
    # whether there are such classes is known with the data
    for name, members in config.evaluate.subsets.items():
        is_list = isinstance(members, list) and members
        if not is_list or not all(isinstance(word, str) for word in members):
            got = f"evaluate.subsets.{name}={members}"
            raise InputError(got, "{NAME: [CLASS, ...]}", "correct evaluate.subsets")


def shards_of_fsdp(config: Config) -> None:
    """parallel.shard_size is fsdp's."""
    parallel = config.parallel
    # ignored it would look as if the memory had been split
    if parallel.shard_size and parallel.strategy != "fsdp":
        got = (
            f"parallel.shard_size={parallel.shard_size} with parallel.strategy={parallel.strategy}"
        )
        action = "write parallel.strategy=fsdp, or parallel.shard_size=0"
        raise InputError(got, "networks in parameter shards", action)


def gathered_in_bf16(config: Config) -> None:
    """parallel.gather_dtype=bf16 is fsdp's, for steps that compute in bf16."""
    strategy = config.parallel.strategy
    # fp16 would need its loss scale before the sum, and fp32 would no longer be one
    if config.parallel.gather_dtype == "fp32" or (
        strategy == "fsdp" and config.precision == "bf16"
    ):
        return
    got = f"parallel.gather_dtype=bf16 with parallel.strategy={strategy} and "
    got += f"precision={config.precision}"
    action = "write parallel.strategy=fsdp precision=bf16, or parallel.gather_dtype=fp32"
    raise InputError(got, "parameter shards, and steps that compute in bf16", action)


def steps_to_profile(config: Config) -> None:
    """There are such steps."""
    if config.profile.steps and profiled_steps(config.profile.steps)[-1] > config.steps:
        got = f"profile.steps={config.profile.steps} of {config.steps} steps"
        raise InputError(got, "steps that the run has", "choose earlier ones")


def profiled_steps(text: str) -> range:
    """Of "10:13" the steps 10 to 13, counted from 1. Raises InputError for what is none."""
    # in a file without quotes YAML has made a number of it, to the base of 60
    found = re.fullmatch(r"(\d{1,8}):(\d{1,8})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        needed = "FIRST:LAST, from 1 on and both included"
        raise InputError(f"profile.steps={text}", needed, "write 10:13, in a file in quotes")
    return range(first, last + 1)


def copies_behind_a_url(config: Config) -> None:
    """checkpoint.copy_to is a URL that can be written to, and holds no credentials."""
    url = config.checkpoint.copy_to
    if not url:
        return
    scheme, separator, place = url.partition("://")
    # a page is read only; whether a bucket may be written to is found when the run starts
    has_place = bool(place.strip("/")) and not (scheme in PACKAGES and place.startswith("/"))
    if not separator or not has_place or scheme in ("", "http", "https"):
        got = f"checkpoint.copy_to={scheme}://..." if separator else f"checkpoint.copy_to={url}"
        needed = (
            "a URL that can be written to: s3://bucket/prefix, gs://bucket/prefix, file:///path"
        )
        raise InputError(got, needed, "correct checkpoint.copy_to")
    check_plain(url, "checkpoint.copy_to")
    if scheme in ("file", "local") and config.run_dir:
        run_dir, copies = Path(config.run_dir).absolute(), Path(place).absolute()
        if copies == run_dir or run_dir in copies.parents:
            got = f"checkpoint.copy_to={url}, which is in run_dir"
            raise InputError(got, "another place", "correct checkpoint.copy_to")


RULES = (
    a_scale_to_evaluate_at,
    windows_that_fit,
    subsets_by_name,
    shards_of_fsdp,
    gathered_in_bf16,
    steps_to_profile,
    copies_behind_a_url,
)
