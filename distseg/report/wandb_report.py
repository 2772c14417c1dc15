"""The report as a W&B Report with the page's panels.

Published where there is a login, else left as its JSON.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from distseg.config.schema import TrackingConfig
from distseg.report.comparison import drawn_panels
from distseg.tracking.catalogue import CLASS_IOU
from distseg.tracking.metric import Metric, Panel
from distseg.tracking.wandb_run import ID_FILE, URL_FILE, choose_mode, naming, read_run_id
from shards.errors import InputError
from shards.files import published

_PAGE = re.compile(r"/(?P<entity>[^/\s]+)/(?P<project>[^/\s]+)/runs/")
_COLUMNS, _PANEL_SIZE = 3, (8, 6)  # W&B's grid is 24 wide


def publish(run_dirs: Sequence[Path], collected: dict[str, Any], spec_path: Path) -> str:
    """Build the report, write its JSON to `spec_path`, and save it in W&B where it can be reached;
    what to tell.

    Raises InputError when wandb-workspaces is not installed, and for runs that W&B never had.
    """
    report = build(run_dirs, collected)
    # before anything is sent: without a network the JSON is what is left of the work
    with published(spec_path) as partial:
        partial.write_text(json.dumps(spec(report), indent=1) + "\n", encoding="utf-8")
    if choose_mode("auto") != "online":
        return f"wrote {spec_path}; no W&B login (`wandb login`), so the report is not published"
    try:
        report.save()
    except Exception as error:  # no network, a server that refuses: the page and the JSON are there
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"wrote {spec_path}; the report could not be published ({reason})"
    return f"W&B report: {report.url}"


def build(run_dirs: Sequence[Path], collected: dict[str, Any]) -> Any:
    """A wandb_workspaces Report of these runs alone, with a panel for every one of the page's that
    has data.
    """
    wr = _workspaces()
    ids = [_run_id(path) for path in run_dirs]
    runs = collected["runs"]
    place = _place(run_dirs[0], runs[0]["config"])
    # by id, which stays; names of W&B's runs can be changed, and are not unique
    runset = wr.Runset(**place, name="runs", filters=f"Metric('ID') in {ids!r}")
    metrics = chain.from_iterable(run["series"] for run in runs)
    panels = drawn_panels(metrics, runs)
    curves = [_line_plot(wr, panel, found) for panel, found in panels]
    sections = {
        "Curves": _placed(wr, curves),
        "Classes": _placed(wr, _class_plots(wr, runs), wide=True),
        "Predictions": _placed(wr, _media(wr, runs), wide=True),
        "Configurations": _placed(wr, [wr.RunComparer(diff_only="split")], wide=True),
    }
    blocks = []
    for title, panels in sections.items():
        if panels or title == "Curves":
            blocks += [wr.H2(title), wr.PanelGrid(runsets=[runset], panels=panels)]
    names = [run["name"] for run in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return wr.Report(
        **place, title=title, description=", ".join(names), blocks=blocks, width="fluid"
    )


def _place(run_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    """The project and entity of a run: of its page, else as it would be named here and now."""
    page = run_dir / URL_FILE
    # https://wandb.ai/ENTITY/PROJECT/runs/ID, also below a path of a server of one's own
    found = _PAGE.search(page.read_text(errors="replace")) if page.is_file() else None
    if found:
        return {"project": unquote(found["project"]), "entity": unquote(found["entity"])}
    project, entity = config.get("tracking.project"), config.get("tracking.entity")
    named = naming(TrackingConfig(project=project, entity=entity), run_dir)
    return {"project": named["project"], "entity": named["entity"] or ""}


def _workspaces() -> Any:
    """The module that builds reports. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("wandb_workspaces.reports.v2")
    # an extra that few need, and not wandb itself, which tracking uses
    except ImportError:
        got = "--wandb, and wandb-workspaces is not installed"
        action = (
            "pip install -e '.[reports]' in the repository, or leave --wandb out: the page has the "
            "same panels"
        )
        raise InputError(got, "wandb-workspaces", action) from None


def _class_plots(wr: Any, runs: Sequence[dict[str, Any]]) -> list[Any]:
    classes = sorted(set().union(*(run["classes"] for run in runs)))
    # the last value of each, which is what a bar plot of W&B takes
    metrics = [CLASS_IOU + name for name in classes]
    return [wr.BarPlot(title="IoU of each class, last evaluation", metrics=metrics)] * bool(metrics)


def _media(wr: Any, runs: Sequence[dict[str, Any]]) -> list[Any]:
    browsers = []
    # in the run's directory masks have no files of their own
    for kind, of_run in (("samples", "samples"), ("masks", "samples"), ("pseudo_labels", "taught")):
        found = chain.from_iterable(run[of_run] for run in runs)
        keys = sorted({sample["key"] for sample in found})
        media = [f"{kind}/{key}" for key in keys]
        browsers += [wr.MediaBrowser(title=kind, media_keys=media)] * bool(media)
    return browsers


def spec(report: Any) -> dict[str, Any]:
    """The report's JSON, as W&B stores it."""
    # private, as the public API only sends a report and cannot give its JSON
    model = report._to_model()
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def _line_plot(wr: Any, panel: Panel, metrics: Sequence[Metric]) -> Any:
    names = [metric.name for metric in metrics]
    # as on the page: shares are drawn from 0 to 1
    bounds = {"range_y": (0.0, 1.0)} if panel.is_share else {}
    return wr.LinePlot(
        title=panel.title, x="step", y=names, title_y=panel.unit, log_y=panel.is_log, **bounds
    )


def _placed(wr: Any, panels: list[Any], wide: bool = False) -> list[Any]:
    """The panels side by side, or each as wide as the page."""
    columns, (width, height) = (1, (24, 12)) if wide else (_COLUMNS, _PANEL_SIZE)
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        panel.layout = wr.Layout(x=column * width, y=row * height, w=width, h=height)
    return panels


def _run_id(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    if not path.is_file():
        action = (
            "leave --wandb out, or report runs made with tracking.wandb=online (or offline, and "
            "`wandb sync`)"
        )
        raise InputError(f"{run_dir} has no {ID_FILE}", "runs that W&B has", action)
    known = read_run_id(path)
    if known is None:
        raise InputError(f"{path} holds no id of a run", "one as W&B gives it", "restore the file")
    return known
