"""Where a run's checkpoints are copied to: looked at before time is spent, and fetched from."""

from __future__ import annotations

from distseg.config import loading
from distseg.config.loading import CONFIG_FILE
from distseg.config.schema import Config
from distseg.data.samples import HELD_OUT_FILE, LABELLED_FILE
from distseg.distributed.ranks import on_main_for_long
from distseg.distributed.watchdog import Watchdog
from distseg.runs import attempts
from distseg.runs.bucket import Bucket
from distseg.runs.copies import Copies, fetch
from distseg.runs.rundir import RunDirectory
from distseg.tracking.tracker import ENVIRONMENT_FILE, METRICS_FILE
from distseg.tracking.wandb_run import ID_FILE
from shards.files import write_text
from shards.storage import is_file

# which samples are the run's: needed before its data are opened
_LISTS = (LABELLED_FILE, HELD_OUT_FILE)
# metrics.jsonl: the schedule's losses are read from it. The id: the run goes on in W&B. The last
# three are for people, for `distseg summarize` and the report. (health.json is made anew from
# metrics.jsonl; pictures, tables and the files of trackers are not what a run goes on from.)
RECORDS = (
    *(CONFIG_FILE, *_LISTS, METRICS_FILE, ID_FILE),
    *(attempts.FILE_NAME, ENVIRONMENT_FILE, "evaluation.json"),
)


def look_away(config: Config, run_directory: RunDirectory, watchdog: Watchdog) -> bool:
    """Look at checkpoint.copy_to, and bring from there what the run directory has none as new of.

    Returns whether something came. Called on every rank. Raises InputError, on all of them, for a
    place that cannot be written or that holds another run, and TemporaryError for one that does not
    answer.
    """
    if not config.checkpoint.copy_to:
        return False
    watchdog.report("looking at checkpoint.copy_to")
    # minutes for a large checkpoint over a slow line
    has_come, steps_before = on_main_for_long(
        run_directory.ranks, lambda: _looked(config, run_directory), watchdog.keep_alive
    )
    run_directory.steps_before = run_directory.steps_before or steps_before
    return has_come


def _looked(config: Config, run_directory: RunDirectory) -> tuple[bool, int | None]:
    bucket, run_dir = Bucket(config.checkpoint.copy_to), run_directory.path
    steps_before = _check_same(bucket, config)
    # after that: another run's place is not written to at all
    bucket.check()
    found = run_directory.fetched = fetch(run_dir, bucket, RECORDS)
    for name in _LISTS:
        content = found.records.pop(name, None)
        if content is not None and not is_file(run_dir / name):
            write_text(run_dir / name, content.decode())
            found.paths.append(run_dir / name)
    # this start's own
    found.records.pop(CONFIG_FILE, None)
    keep_last = config.checkpoint.keep_last
    run_directory.copies = Copies(run_dir, bucket, keep_last, RECORDS, found.damaged)
    return bool(found.paths), steps_before


def _check_same(bucket: Bucket, config: Config) -> int | None:
    """As `loading.check_same`, of the run that is copied there."""
    saved = bucket.read(CONFIG_FILE)
    if saved is None:
        return None
    before = loading.from_bytes(saved, f"{bucket.url}/{CONFIG_FILE}")
    way_out = f"write checkpoint.copy_to=URL to copy to another place, or remove {bucket.url}"
    return loading.check_goes_on(before, config, bucket.url, way_out)
