"""The report: what it reads from run directories, and the page as a browser shows it."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from distseg.cli import main
from distseg.report import content
from distseg.report.panels import PANELS
from distseg.runs.attempts import LABEL_VARIABLE, Note
from distseg.tracking.tracker import _json_value
from shards.errors import InputError

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = "a <script>alert(1)</script> & b"
CLASSES = ("sky", HOSTILE)


def write_run(
    run_dir: Path, seed: int, num_rows: int = 40, won: bool = False, **config: Any
) -> Path:
    """A run directory as training writes it, with scores that follow from the seed."""
    run_dir.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(10, 10 * num_rows + 1, 10):
        row = {
            "step": step,
            "time": 0.0,
            "loss/segmentor": 1 / step,
            "loss/discriminator_real": 0.4,
            "step_seconds": 3.0,
        }
        row |= {
            "loss/discriminator_fake": 0.02 if won and step > 200 else 0.3,
            "discriminator/accuracy": 0.95,
        }
        rows.append(row)
        if step % 200 == 0:
            iou = {f"val/iou/{name}": 0.5 + seed / 10 + step / 10000 for name in CLASSES}
            rows.append(
                {"step": step, "val/mean_iou": 0.6 + seed / 10, "val/pixel_accuracy": 0.8, **iou}
            )
    rows[3]["loss/segmentor"] = float("nan") if won else 0.1
    lines = [
        {name: value if name == "step" else _json_value(value) for name, value in row.items()}
        for row in rows
    ]
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4'
    )
    settings = {
        "preset": "toy",
        "mode": "adversarial",
        "seed": seed,
        "run_dir": str(run_dir),
        "steps": 400,
    }
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump(settings | {"loss": {"adv_weight": 0.05} | config})
    )
    evaluation = {
        "val/mean_iou": 0.6 + seed / 10,
        "confusion": [[90, 10], [30, 70]],
        "num_images": 4,
        "split": "val",
    }
    evaluation |= {"step": 400} | {f"val/iou/{name}": 0.5 for name in CLASSES}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    (run_dir / "pictures" / "samples").mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run_dir / "pictures" / "samples" / "img_1.png")
    return run_dir


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    made = [write_run(tmp_path / "a" / "s0", 0), write_run(tmp_path / "a" / "s1", 1)]
    return [*made, write_run(tmp_path / "won", 0, won=True, adv_weight=0.5)]


def test_runs_of_several_seeds_are_a_group_with_mean_and_standard_deviation(
    runs: list[Path],
) -> None:
    collected = content.collect_all(runs)
    assert [group["runs"] for group in collected["groups"]] == [[0, 1], [2]]
    score = collected["groups"][0]["scores"]["mean_iou"]
    assert score["mean"] == pytest.approx(0.65) and score["spread"] == pytest.approx(0.1 / 2**0.5)
    assert collected["groups"][1]["scores"]["mean_iou"] == {"mean": 0.6, "spread": None, "count": 1}
    assert collected["groups"][0]["note"] == "n = 2 of 2"
    differences = {row["key"]: row["values"] for row in collected["differences"]}
    assert differences == {"seed": [0, 1, 0], "loss.adv_weight": [0.05, 0.05, 0.5]}


def test_old_and_new_names_of_keys_are_one_group_and_no_difference(runs: list[Path]) -> None:
    for run, name in zip(runs[:2], ("mirror", "horizontal_flip"), strict=True):
        saved = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(saved | {"data": {name: False}}))
    collected = content.collect_all(runs[:2])
    assert [group["runs"] for group in collected["groups"]] == [[0, 1]]
    assert [row["key"] for row in collected["differences"]] == ["seed"]


def test_a_mean_is_over_finished_runs_and_distinct_seeds(runs: list[Path], tmp_path: Path) -> None:
    mid, again = write_run(tmp_path / "mid", 2, num_rows=20), write_run(tmp_path / "again", 1)
    (mid / "evaluation.json").unlink()
    (again / "evaluation.json").write_text(json.dumps({"val/mean_iou": 0.9, "step": 400}))
    group = content.collect_all([*runs[:2], mid, again])["groups"][0]
    assert group["runs"] == [0, 1, 2, 3] and group["name"] == "toy, adversarial, seeds 0, 1, 2"
    score = group["scores"]["mean_iou"]  # of seed 0: 0.6, of seed 1: 0.7 and 0.9
    assert score == {"mean": pytest.approx(0.7), "spread": pytest.approx(0.2 / 2**0.5), "count": 2}
    assert (
        group["note"]
        == "n = 3 of 4; mid is not finished; s1 and again have seed 1 and count as one"
    )
    (group,) = content.collect_all([runs[1], again])["groups"]
    assert group["scores"]["mean_iou"] == {"mean": pytest.approx(0.8), "spread": None, "count": 1}
    # of a shorter run
    (again / "evaluation.json").write_text(json.dumps({"val/mean_iou": 0.9, "step": 200}))
    assert not content.collect(again)["is_finished"]
    with pytest.raises(InputError, match="twice"):
        content.collect_all([again, runs[0], tmp_path / "mid" / ".." / "again"])


def test_a_run_is_read_as_it_was_written(runs: list[Path]) -> None:
    run = content.collect(runs[2])
    steps, values = run["series"]["loss/segmentor"]
    assert steps == list(range(10, 401, 10)) and values[0] == 0.1 and values[3] is None
    assert run["minutes"] == pytest.approx(400 * 3 / 60)
    assert [entry["step"] for entry in run["iou"]] == [200, 400] and run["classes"] == list(CLASSES)
    assert (
        run["confusion"]["matrix"] == [[90, 10], [30, 70]] and run["samples"][0]["key"] == "img_1"
    )
    lanes = {lane["name"]: lane["spans"] for lane in run["health"]}
    assert [(s["since"], s["to"]) for s in lanes["discriminator_has_won"]] == [(200, None)]
    assert [(s["from"], s["to"]) for s in lanes["not_finite"]] == [
        (40, 140)
    ] and "slow_rank" not in lanes
    judged = {lane["name"]: lane["judged_from"] for lane in run["health"]}
    # 5 rows; 150 steps
    assert (judged["discriminator_has_won"], judged["discriminator_is_blind"]) == (50, 160)


def test_a_confusion_matrix_is_of_the_runs_classes_and_says_where_it_is_from(
    runs: list[Path],
) -> None:
    training, other = runs[0] / "evaluation.json", runs[0] / "evaluation-step-00000200-test.json"
    assert content.collect(runs[0])["confusion"]["file"] == "evaluation.json"
    document = json.loads(training.read_text()) | {"split": "test", "step": 200}
    training.unlink()
    others = {"val/iou/a": 0.5, "val/iou/b": 0.5, "confusion": document["confusion"]}
    other.write_text(json.dumps(others))
    assert content.collect(runs[0])["confusion"] is None, "as many classes, and others"
    other.write_text(json.dumps(document))
    about = {"file": other.name, "split": "test", "step": 200}
    assert content.collect(runs[0])["confusion"] == about | {"matrix": [[90, 10], [30, 70]]}


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    run_dir = tmp_path / "bare"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss/segmentor": 2.0}\n')
    run = content.collect(run_dir)
    assert (run["confusion"], run["samples"], run["attempts"], run["config"], run["iou"]) == (
        None,
        [],
        [],
        {},
        [],
    )
    assert not run["is_finished"] and run["scores"]["mean_iou"] is None
    with pytest.raises(InputError, match="does not exist"):
        content.collect(tmp_path / "nothing")


def test_each_start_is_one_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LABEL_VARIABLE, raising=False)
    Note(tmp_path, ["node1", "node1", "node2"], 0).finish(20, "stopped", "signal 15")
    Note(tmp_path, ["node3"], 20)
    first, second = content.starts(tmp_path)
    assert (first["hosts"], first["ranks"], first["label"]) == ("node1, node2", 3, "")
    assert (first["from step"], first["to step"], first["outcome"], first["reason"]) == (
        0,
        20,
        "stopped",
        "signal 15",
    )
    assert datetime.strptime(first["ended"][:19], "%Y-%m-%d %H:%M:%S") <= datetime.now()
    assert (second["from step"], second["to step"], second["ended"]) == (20, None, None)
    assert second["outcome"] == "running or killed"  # its end is noted nowhere
    Note(tmp_path, ["node3"], 20)
    assert [row["outcome"] for row in content.starts(tmp_path)] == [
        "stopped",
        "killed",
        "running or killed",
    ]


def test_names_are_as_short_as_they_may_be() -> None:
    assert content.distinct_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert content.distinct_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


def test_long_curves_become_means_on_one_grid_of_steps() -> None:
    long, short = ([step * 1.0 for step in range(1, last + 1)] for last in (5003, 1502))
    runs = [
        {"series": {"a": (list(range(1, len(v) + 1)), v), "b": ([200], [1.0])}}
        for v in (long, short)
    ]
    content.thin(runs)
    (steps, means), (short_steps, _) = (run["series"]["a"] for run in runs)
    assert len(steps) <= content.MAX_POINTS and steps[-1] == 5003
    assert means[0] == pytest.approx(3.0) and steps[0] == 5  # of five
    assert short_steps == [*steps[:300], 1502]
    assert all(run["series"]["b"] == ([200], [1.0]) for run in runs), "few values stay as they are"
    assert content.thinned([1, 2, 3], [1.0, None, 3.0], 2) == ([2, 3], [None, 3.0])


def test_the_page_needs_nothing_from_elsewhere_and_shows_no_name_as_html(
    runs: list[Path], tmp_path: Path
) -> None:
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, never fetched
    assert not re.search(r"<link|\ssrc=\"(?!data:)|@import|url\(", page)
    assert HOSTILE not in page and "alert(1)" in page
    with pytest.raises(SystemExit):
        main(["report"])
    assert main(["report", str(tmp_path)]) == 2


# Runs in the page when it is drawn: works the controls, and leaves what it saw where --dump-dom
# shows it
_FIRST = """<script>
const seen = {};
const count = (query) => document.querySelectorAll(query).length;
const nodes = (query) => [...document.querySelectorAll(query)];
"""
_LAST = """
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>"""
PROBE = """
const charts = () => [...document.querySelectorAll("figure")].filter((f) => f.style.display !== "none").length;
const ranges = () => [...document.querySelectorAll("input[type=range]")];
seen.ready = document.body.dataset.ready;
seen.titles = [...document.querySelectorAll("h2")].map((h) => h.textContent);
seen.charts = charts();
seen.overflow = document.documentElement.scrollWidth - innerWidth;
seen.cut = nodes("figure svg").filter((s) => s.getBoundingClientRect().right > innerWidth).length;
seen.paths = count("figure path");
seen.bad = nodes("path, line, rect, text").filter((n) => /NaN|Infinity/.test(n.outerHTML)).length;
const iou = ranges().find((r) => r.getAttribute("aria-label") === "evaluation");
seen.last = iou.parentNode.textContent;
iou.value = 0; iou.dispatchEvent(new Event("input"));
seen.first = iou.parentNode.textContent;
seen.bars = [...document.querySelectorAll("rect title")].map((t) => t.textContent);
const boxes = [...document.querySelectorAll(".bar input[type=checkbox]")];
boxes[0].click();
seen.fewer = count("figure path");
document.getElementById("means").click();
seen.bands = count("figure polygon");
boxes[0].click();
seen.bandsOfBoth = count("figure polygon");
seen.images = [...document.querySelectorAll(".gallery img")].map((i) => i.naturalWidth);
seen.verdicts = [...document.querySelectorAll(".verdict strong")].map((v) => v.textContent);
seen.means = [...document.querySelectorAll("tr.mean td")].map((v) => v.textContent);
seen.scripts = count("script");
"""


def look(page: Path, width: int, probe: str = PROBE) -> dict[str, Any]:
    """What the probe saw in a window of so many pixels."""
    probed = page.with_name(f"probed-{width}.html")
    probed.write_text(page.read_text().replace("</body>", _FIRST + probe + _LAST + "</body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options += [
        f"--user-data-dir={page.parent / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *options, probed.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [1400, 520])
def test_a_browser_shows_every_section_and_the_controls_work(
    runs: list[Path], tmp_path: Path, width: int
) -> None:
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "r.html")]) == 0
    seen = look(tmp_path / "r.html", width)
    assert seen["ready"] == "1" and seen["bad"] == 0
    assert seen["overflow"] <= 0 and seen["cut"] == 0  # nothing is wider than the window
    sections = ["Runs", "Health", "Curves", "IoU of each class", "Confusion matrix", "Predictions"]
    assert seen["titles"] == [*sections, "What differs between the configurations", "Configuration"]
    metrics = {name for run in runs for name in content.collect(run)["series"]}
    assert seen["charts"] == sum(
        bool(metrics & {name for name, _ in panel.metrics}) for panel in PANELS
    )
    assert "step 400" in seen["last"] and "step 200" in seen["first"]
    bars = [
        f"{run}, {name}: {value} %"
        for run, value in (("s0", 52.0), ("s1", 62.0), ("won", 52.0))
        for name in CLASSES
    ]
    assert set(bars) <= set(seen["bars"])
    assert f"sky taken for {HOSTILE}: 10.0 % (10 pixels)" in seen["bars"]
    assert seen["fewer"] < seen["paths"]
    assert seen["bands"] == 0 < seen["bandsOfBoth"]  # of one run there is no band
    assert seen["images"] == [60, 60, 60]
    assert [text.split(": ")[0] for text in seen["verdicts"]] == ["won", "won"]
    assert any("won" in text for text in seen["verdicts"]) and "65.0 ± 7.1" in seen["means"]
    assert seen["scripts"] == 3  # data, page, probe: no class name became one


MEANS = """
const losses = () => nodes("figure").find((f) => f.textContent.startsWith("Segmentor"));
const point = (share) => {
  const svg = losses().querySelector("svg"), box = svg.getBoundingClientRect();
  const clientX = box.left + 52 + (box.width - 62) * share;
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY: box.top + 50 }));
  return nodes(".tip > *").map((row) => row.textContent);
};
document.getElementById("means").click();
seen.legend = losses().querySelector(".legend").textContent;
seen.band = losses().querySelector("polygon").getBBox().width;
seen.line = losses().querySelector("path").getBBox().width;
seen.tip = point(1);
seen.pieces = losses().querySelector("path").getAttribute("d").split("M").length - 1;
const ofRuns = ".bar .swatch, #runs ~ .scroll tr:not(.mean) .swatch, .gallery .swatch";
const colours = () => new Set(nodes(ofRuns).map((swatch) => swatch.style.borderTopColor)).size;
seen.colours = colours();
document.getElementById("means").click();
seen.ownColours = colours();
seen.ownTip = point(1);
seen.midTip = point(0.48);
document.getElementById("means").click();
seen.bars = nodes("rect title").map((t) => t.textContent);
seen.figures = nodes("text").map((t) => t.textContent);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_mean_on_the_page_leaves_out_what_ends_early(runs: list[Path], tmp_path: Path) -> None:
    mid = write_run(tmp_path / "mid", 2, num_rows=20)
    (mid / "evaluation.json").unlink()
    metrics = (runs[1] / "metrics.jsonl").read_text()
    (runs[1] / "metrics.jsonl").write_text(
        metrics.replace('"loss/segmentor": 0.01,', '"loss/segmentor": "NaN",')
    )
    assert main(["report", *map(str, runs[:2]), str(mid), "--out", str(tmp_path / "r.html")]) == 0
    seen = look(tmp_path / "r.html", 1400, MEANS)
    assert "no value at step 400, so in no mean: mid" in seen["legend"]
    assert seen["band"] == pytest.approx(seen["line"], rel=0.01) and seen["line"] > 300, (
        "up to the last step"
    )
    assert seen["tip"] == ["step 400", "toy, adversarial, seeds 0, 1, 2, total: 0.0025"]
    assert seen["pieces"] == 2, "a gap where one of the values is not finite"
    assert (seen["colours"], seen["ownColours"]) == (1, 3), (
        "of a run everywhere that of the curve that it is in"
    )
    assert seen["ownTip"] == ["step 400", "s0, total: 0.0025", "s1, total: 0.0025"], (
        "mid ended at step 200"
    )
    assert [text.split(",")[0] for text in seen["midTip"]] == ["step 190", "s0", "s1", "mid"]
    assert "toy, adversarial, seeds 0, 1, 2, sky: 59.0 % (54.0 to 64.0)" in seen["bars"]
    assert "mean 59.0 (54.0 to 64.0)" in seen["figures"]


HEALTH = """
seen.lines = nodes("#health ~ div svg title").map((t) => t.textContent);
seen.verdict = nodes(".verdict").map((v) => [v.className, v.textContent]);
seen.section = nodes("#health ~ div")[0].textContent;
seen.curves = nodes("#curves ~ p:not(.note)").map((p) => (p.style.display === "none" ? "" : p.textContent)).join("");
seen.table = nodes("#runs + p + .scroll td").map((c) => c.textContent);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_says_what_cannot_be_told_yet(tmp_path: Path) -> None:
    early = write_run(tmp_path / "early", 0, num_rows=20)  # 200 steps
    rows = (early / "metrics.jsonl").read_text().splitlines(keepends=True)
    (early / "metrics.jsonl").write_text("".join(rows[:8]))
    assert main(["report", str(early), "--out", str(tmp_path / "early.html")]) == 0
    seen = look(tmp_path / "early.html", 1400, HEALTH)
    ((kind, text),) = seen["verdict"]
    assert kind == "verdict open" and text.endswith(
        "Too early to tell: the discriminator is blind."
    )
    assert "early: the discriminator is blind? Too early to tell" in seen["lines"]
    assert any("too early to tell for 1 of" in cell for cell in seen["table"])
    (early / "metrics.jsonl").write_text("")
    assert main(["report", str(early), "--out", str(tmp_path / "none.html")]) == 0
    seen = look(tmp_path / "none.html", 1400, HEALTH)
    assert seen["section"] == "No signals yet." and not seen["verdict"]
    assert seen["curves"] == "No rows yet."


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces' own, of pydantic
@pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="pip install 'distseg[reports]'"
)
def test_the_wandb_report_has_the_same_panels_over_these_runs(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "r.html"), "--wandb"]) == 2
    assert "wandb_id.txt" in capsys.readouterr().err
    for number, run in enumerate(runs):
        (run / "wandb_id.txt").write_text(f"id{number}\n")
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "r.html"), "--wandb"]) == 0
    assert "not published" in capsys.readouterr().out
    spec = json.loads((tmp_path / "r.wandb.json").read_text())
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    plots = [panel["config"] for panel in grids[0]["panelBankSectionConfig"]["panels"]]
    metrics = {name for run in runs for name in content.collect(run)["series"]}
    wanted = [
        (panel.title, [name for name, _ in panel.metrics if name in metrics]) for panel in PANELS
    ]
    assert [(plot["chartTitle"], plot["metrics"]) for plot in plots] == [
        (title, names) for title, names in wanted if names
    ]
    assert all(plot["xAxis"] == "step" for plot in plots)
    (chosen,) = grids[0]["runSets"][0]["filters"]["filters"]
    assert (chosen["key"], chosen["op"], chosen["value"]) == (
        {"section": "run", "name": "name"},
        "IN",
        ["id0", "id1", "id2"],
    )
    media = [panel["config"] for panel in grids[2]["panelBankSectionConfig"]["panels"]]
    assert [config["mediaKeys"] for config in media] == [["samples/img_1"], ["masks/img_1"]]
