"""One W&B run, kept at arm's length: training never waits for it and never stops because of it.

Importing wandb (0.6 s), starting its service, logging in and uploading happen in one background
thread behind a bounded queue. A failure costs one warning and the W&B curves; metrics.jsonl has
every value anyway.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from distseg.config.schema import TrackingConfig
from shards.files import published
from shards.sample import IGNORE_INDEX

ID_FILE = "wandb_id.txt"
URL_FILE = "wandb_url.txt"  # of a run that is online
_QUEUE_LENGTH = 2000  # rows; at one row a second, half an hour without an answer
# in the background; a compute node without network falls back to offline after this
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 60.0  # how long the end of a run may wait for uploads
_LOGIN_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_SECRET_NAME = re.compile(r"(?i)(api_?key|token|secret|passw|credential|private_?key)")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")

PROJECT = "distseg"
# WANDB_MODE's words, the older ones too -> ours; "shared" is online with several writers
_MODES = {"dryrun": "offline", "run": "online", "shared": "online"}
_MODES |= {mode: mode for mode in ("online", "offline", "disabled")}
# what a run decides itself; W&B would add them to what it is given, or stop over them
_OWN = ("WANDB_CONFIG_PATHS", "WANDB_RESUME")
# it is part of names of files, and of the page's address
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_log = logging.getLogger(__name__)

_Action = Callable[[Any], None]  # takes the wandb.Run
Names = tuple[str, ...]


def choose_mode(wanted: str) -> str:
    """Resolve "auto" and missing logins to "online", "offline" or "disabled".

    "auto" follows WANDB_MODE, or WANDB_DISABLED, where one is set. "online" without a login would
    ask for one on the terminal, which nobody reads in a batch job, so it becomes "offline" with a
    warning.
    """
    # said in the environment means said by the cluster or the user, who know more than a default
    # does
    if wanted == "auto":
        wanted = _said_mode() or ("online" if _has_login() else "offline")
    if wanted == "online" and not _has_login():
        _log.warning(
            "W&B: no login found (run `wandb login`); writing offline, upload later with `wandb "
            "sync`"
        )
        return "offline"
    return wanted


def _said_mode() -> str:
    """The mode that the environment asks for; "" for none."""
    said = os.environ.get("WANDB_MODE", "").strip().lower()
    if said in _MODES:
        return _MODES[said]
    if said:
        _log.warning("WANDB_MODE=%s is none of: %s; it is left out", said, ", ".join(_MODES))
    # of W&B's earlier versions, and still in many scripts
    is_off = os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")
    return "disabled" if is_off else ""


def naming(settings: TrackingConfig, run_dir: Path) -> dict[str, Any]:
    """wandb.init's arguments that name a run: what the configuration says, else W&B's environment.

    With neither, the project is "distseg", and the name that of the run's directory.
    """

    def said(name: str) -> str | None:
        return os.environ.get(f"WANDB_{name}") or None

    tags = [tag.strip() for tag in (said("TAGS") or "").split(",")]
    return {
        "project": settings.project or said("PROJECT") or PROJECT,
        "entity": settings.entity or said("ENTITY"),
        "group": settings.group or said("RUN_GROUP"),
        "job_type": settings.job_type or said("JOB_TYPE"),
        "tags": list(settings.tags) or list(filter(None, tags)),
        "name": said("NAME") or run_dir.resolve().name,
        "notes": said("NOTES"),
    }


# what a run can owe to a step that it was stopped at
MADE_UP = ("val/", "held_out/", "samples/", "masks/", "pseudo_labels/", "tables/", "curves")


class WandbRun:
    """A W&B run that can be resumed by the id kept in `run_dir`/wandb_id.txt.

    mode: "online" or "offline". options: keyword arguments of wandb.init that name the run
    (as `naming` gives them). config: nested dict of plain values; what looks like a
    secret is removed.
    """

    def __init__(self, run_dir: Path, mode: str, options: dict[str, Any], config: dict[str, Any]):
        self._run_dir, self._mode, self._options = run_dir, mode, options
        self._config = without_secrets(config)
        self._id = _run_id(run_dir / ID_FILE)
        self._actions: queue.Queue[_Action | None] = queue.Queue(_QUEUE_LENGTH)
        # set once, for good: a service that has died would be waited for again and again
        self._failed = threading.Event()
        self._num_dropped = 0
        self._exit_code = 0
        # a daemon, so that an upload that hangs cannot keep the process
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Queue one row; rows of the same step become one row of the W&B history."""
        # a closure, run in the thread: whoever calls here never touches wandb
        self._queue(lambda run: _log_row(run, step, values))

    def image(self, step: int, name: str, picture: Path | np.ndarray, caption: str) -> None:
        """Queue a picture: a file, or uint8 (H, W, 3) RGB that the caller does not write to
        again.
        """

        def show(run: Any) -> None:
            import wandb

            data = str(picture) if isinstance(picture, Path) else picture
            _log_row(run, step, {name: wandb.Image(data, caption=caption or None)})

        self._queue(show)

    def masks(
        self, step: int, name: str, picture: np.ndarray, masks: dict[str, np.ndarray], names: Names
    ) -> None:
        """Queue a uint8 (H, W, 3) picture with masks, (H, W) uint8 class indices by name, to be
        laid over it there.
        """

        def show(run: Any) -> None:
            import wandb

            labels = {**dict(enumerate(names)), IGNORE_INDEX: "void"}
            layers = {
                key: {"mask_data": mask, "class_labels": labels} for key, mask in masks.items()
            }
            _log_row(run, step, {name: wandb.Image(picture, masks=layers)})

        self._queue(show)

    def table(self, step: int, name: str, columns: Names, rows: list[tuple[Any, ...]]) -> None:
        """Queue a table."""

        def show(run: Any) -> None:
            import wandb

            _log_row(
                run,
                step,
                {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])},
            )

        self._queue(show)

    def summary(self, values: dict[str, float]) -> None:
        """Queue values of the whole run, which its rows have none of."""
        self._queue(lambda run: run.summary.update(values))

    def alert(self, title: str, text: str, is_error: bool) -> None:
        """Queue an alert, which W&B sends by mail or chat where the user asked for that."""
        self._queue(
            lambda run: run.alert(title=title, text=text, level="ERROR" if is_error else "WARN")
        )

    def finish(self, exit_code: int) -> None:
        """Let the thread write out what is queued and end the run; wait at most a minute."""
        # before the None: the thread reads it when it has come to that
        self._exit_code = exit_code
        deadline = time.monotonic() + _FINISH_SECONDS
        with contextlib.suppress(queue.Full):  # still full after a minute: told below
            self._actions.put(None, timeout=_FINISH_SECONDS if self._thread.is_alive() else 0.01)
        # one deadline for both waits, or the end could take twice the promised time
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._num_dropped:
            _log.warning(
                "W&B was too slow: %d rows were not sent; metrics.jsonl has them", self._num_dropped
            )
        if self._thread.is_alive():
            _log.warning("W&B has not finished after %.0f s; leaving it", _FINISH_SECONDS)

    def _queue(self, action: _Action) -> None:
        if self._failed.is_set():
            return
        try:
            # a full queue drops the row: waiting here would have the training wait for a network
            self._actions.put_nowait(action)
        except queue.Full:
            self._num_dropped += 1

    def _work(self) -> None:
        try:
            # in the thread too: a login and a start can take half a minute
            run = self._start()
            while (action := self._actions.get()) is not None:
                action(run)
            run.finish(exit_code=self._exit_code)
        except Exception as error:  # whatever goes wrong over there, training goes on
            self._failed.set()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _log.warning("W&B stopped (%s); this run goes on with metrics.jsonl only", reason)

    def _start(self) -> Any:
        import wandb

        with _without(_OWN):
            wandb.setup()  # which reads the environment
        if self._mode == "online":
            try:
                # "allow": one command starts a run and goes on with it
                run = self._init("online", resume="allow")
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                _log.warning(
                    "W&B cannot be reached (%s); writing offline, upload with `wandb sync`", reason
                )
                wandb.teardown(1)  # the service still holds the id of the failed run
                run = self._init("offline", resume=None)
            else:
                print(f"W&B: {run.url}", flush=True)
                # for people: the way from a run directory to its page
                (self._run_dir / URL_FILE).write_text(f"{run.url}\n")
        else:
            run = self._init("offline", resume=None)
        # W&B's own counter is the training step too, but only a metric can be named as the x axis
        # everywhere.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def _init(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None) -> Any:
        import wandb

        settings = wandb.Settings(
            mode=mode,
            root_dir=str(self._run_dir),
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            silent=True,  # the live line owns the terminal
            console="off",
            x_disable_meta=True,  # the command line and the git remote can hold tokens
            x_save_requirements=False,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            # The stop button of the web page: a checkpoint and a clean end, as for Ctrl-C. Not
            # SIGTERM: it is a person's wish, after which a job must not come back as it does after
            # a scheduler's signal.
            stop_fn=_StopOnce(),
        )
        return wandb.init(
            **self._options,
            id=self._id,
            resume=resume,
            config=self._config,
            settings=settings,
            reinit="create_new",  # a run that the caller's own code has open stays its own
        )


class _StopOnce:
    """Sends this process SIGINT, once: a second one would not wait for the step."""

    def __init__(self) -> None:
        self._sent = False

    def __call__(self) -> None:
        if not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGINT)


def without_secrets(value: Any, _name: str = "") -> Any:
    """Copy a nested config without what must not leave the machine.

    Removed: values under names such as api_key or token, logins inside URLs, and every value that
    the environment holds under such a name (an interpolated ${oc.env:...} ends up in the resolved
    config).
    """
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, _name) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(_name):
        return "<removed>"
    for name, secret in os.environ.items():
        # shorter ones would be found within ordinary words, and tear holes into the config
        if len(secret) >= 8 and _SECRET_NAME.search(name):
            value = value.replace(secret, "<removed>")
    return _URL_LOGIN.sub("<removed>@", value)


def _log_row(run: Any, step: int, values: dict[str, Any]) -> None:
    # A run resumed from an earlier checkpoint repeats steps that W&B has already; it takes no step
    # twice. Pictures and scores of the last checkpoint that were still missing go into the next
    # row: the x axis is "step" all the same.
    is_made_up = all(name.startswith(MADE_UP) for name in values)
    if step >= run.step or is_made_up:
        run.log({"step": step, **values}, step=max(step, run.step))


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # a server of the user's own has a login of its own
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(server).netloc,) if server else _LOGIN_HOSTS
    try:
        logins = netrc.netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc"))
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: a user without a home
        return False
    return any(host in logins.hosts for host in hosts)


def read_run_id(path: Path) -> str | None:
    """The id in a file; None where it holds none: W&B makes folders by it."""
    known = path.read_text(encoding="utf-8", errors="replace").strip()
    return known if _ID.fullmatch(known) else None


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """The environment without some variables, for a moment."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _run_id(path: Path) -> str:
    # the file first, so that every attempt writes into the same W&B run; `wandb agent`, and whoever
    # made one before, say its id in the environment
    known = path.read_text(errors="replace").strip() if path.exists() else ""
    said = {str(path): known, "WANDB_RUN_ID": os.environ.get("WANDB_RUN_ID", "")}
    for place, text in said.items():
        if text and not _ID.fullmatch(text):
            _log.warning("%s: %.80r is no id of a W&B run, and is left out", place, text)
    new = next(filter(_ID.fullmatch, said.values()), None) or secrets.token_hex(4)
    if new == known:
        return known
    with published(path) as partial:
        partial.write_text(new + "\n")
    return new
