"""The report: what it reads from run directories, and the page as a browser shows it."""

from __future__ import annotations

import html
import importlib.util
import itertools
import json
import math
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
from distseg.report import comparison, content
from distseg.report.classes import confusion_matrix, shares_section
from distseg.report.curves import COLORS, css_colors, curve, entries_of, mean_line, panel_svg
from distseg.report.page import render, style
from distseg.runs.attempts import LABEL_VARIABLE, Note
from distseg.tracking import catalogue
from distseg.tracking.figures import Line
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
    (run_dir / "pictures" / "pseudo_labels").mkdir()
    Image.fromarray(noise).save(run_dir / "pictures" / "pseudo_labels" / "unlabelled_1.png")
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
    score = collected["groups"][0]["scores"]["val/mean_iou"]
    assert score["mean"] == pytest.approx(0.65) and score["deviation"] == pytest.approx(
        0.1 / 2**0.5
    )
    assert collected["groups"][1]["scores"]["val/mean_iou"] == {
        "mean": 0.6,
        "deviation": None,
        "count": 1,
    }
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
    score = group["scores"]["val/mean_iou"]  # of seed 0: 0.6, of seed 1: 0.7 and 0.9
    assert score == {
        "mean": pytest.approx(0.7),
        "deviation": pytest.approx(0.2 / 2**0.5),
        "count": 2,
    }
    assert (
        group["note"]
        == "n = 3 of 4; mid is not finished; s1 and again have seed 1 and count as one"
    )
    (group,) = content.collect_all([runs[1], again])["groups"]
    assert group["scores"]["val/mean_iou"] == {
        "mean": pytest.approx(0.8),
        "deviation": None,
        "count": 1,
    }
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
    spans = {check["name"]: check["spans"] for check in run["health"]}
    assert [(s["since"], s["to"]) for s in spans["discriminator_has_won"]] == [(200, None)]
    assert [(s["from"], s["to"]) for s in spans["not_finite"]] == [(40, 140)]
    assert "slow_rank" not in spans
    judged = {check["name"]: check["judged_from"] for check in run["health"]}
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


def test_class_shares_of_both_domains_are_shown_of_the_run_that_has_them(runs: list[Path]) -> None:
    path = runs[0] / "evaluation.json"
    shares = {"val": (0.91, 0.0), "source": (0.6, 0.05)}
    found = json.loads(path.read_text())
    for prefix, values in shares.items():
        for name, value in zip(CLASSES, values, strict=True):
            found[f"{prefix}/predicted_share/{name}"] = value
    path.write_text(json.dumps(found))
    collected = content.collect_all(runs[:2])
    assert [run["shares"] for run in collected["runs"]] == [[[0.91, 0.6], [0.0, 0.05]], []]
    section = shares_section(collected, entries_of(collected))
    assert section is not None and "s1" not in section.content
    texts = re.findall("<td[^>]*>([^<]*)</td>", section.content)
    assert texts == ["sky", "91.0", "60.0", html.escape(HOSTILE), "0.0", "5.0"]
    # titles stand over their numbers, at the right
    assert re.findall('<th class="([^"]*)"', section.content) == ["", "number", "number"]
    assert shares_section(content.collect_all(runs[1:2]), entries_of(collected)) is None


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
    assert not run["is_finished"] and run["scores"]["val/mean_iou"] is None
    with pytest.raises(InputError, match="does not exist"):
        content.collect(tmp_path / "nothing")


def test_each_start_is_one_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LABEL_VARIABLE, raising=False)
    Note(tmp_path, ["node1", "node1", "node2"], 0).finish(20, "stopped", "signal 15")
    Note(tmp_path, ["node3"], 20)
    first, second = content.attempt_rows(tmp_path)
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
    assert [row["outcome"] for row in content.attempt_rows(tmp_path)] == [
        "stopped",
        "killed",
        "running or killed",
    ]


def test_names_are_as_short_as_they_may_be() -> None:
    assert comparison.distinct_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert comparison.distinct_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


def test_long_curves_become_means_on_one_grid_of_steps() -> None:
    long, short = ([step * 1.0 for step in range(1, last + 1)] for last in (5003, 1502))
    runs = [
        {"series": {"a": (list(range(1, len(v) + 1)), v), "b": ([200], [1.0])}}
        for v in (long, short)
    ]
    comparison.thin(runs)
    (steps, means), (short_steps, _) = (run["series"]["a"] for run in runs)
    assert len(steps) <= comparison.MAX_POINTS and steps[-1] == 5003
    assert means[0] == pytest.approx(5.5) and steps[0] == 10  # of ten
    assert short_steps == [*steps[:150], 1502]
    assert all(run["series"]["b"] == ([200], [1.0]) for run in runs), "few values stay as they are"
    assert comparison.thinned([1, 2, 3], [1.0, None, 3.0], 2) == ([2, 3], [None, 3.0])


def test_the_page_needs_nothing_from_elsewhere_and_shows_no_name_as_html(
    runs: list[Path], tmp_path: Path
) -> None:
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert not re.findall(r"https?://[^\s\"']*", page)
    assert not re.search(r"<script|<link|\ssrc=\"(?!data:)|@import|url\((?!#)", page)
    assert HOSTILE not in page and "alert(1)" in page
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path)]) == 2


def line_of(values: list[float], steps: list[int] | None = None, **more: Any) -> Line:
    steps = list(range(1, len(values) + 1)) if steps is None else steps
    return Line(np.array(steps, float), np.array(values, float), "", "#000000", **more)


def test_a_mean_counts_a_seed_once_at_steps_that_all_runs_have() -> None:
    lines = [
        line_of([1, 2, 3, 4]),
        line_of([5, 4, math.nan, 8]),
        line_of([6, 6, 6, 6, 6], [1, 2, 3, 4, 9]),
    ]
    mean = mean_line(lines, [0, 1, 1], label="", color="#000000")
    assert mean.steps.tolist() == [1, 2, 3, 4]
    expected = [(1 + 5.5) / 2, (2 + 5) / 2, math.nan, (4 + 7) / 2]
    np.testing.assert_allclose(mean.values, expected)
    assert mean.band is not None
    np.testing.assert_array_equal(mean.band[0], [1, 2, math.nan, 4])
    np.testing.assert_array_equal(mean.band[1], [6, 6, math.nan, 8])


def test_a_mean_leaves_out_runs_that_end_early(runs: list[Path], tmp_path: Path) -> None:
    mid = write_run(tmp_path / "mid", 2, num_rows=20)
    (mid / "evaluation.json").unlink()
    metrics = (runs[1] / "metrics.jsonl").read_text()
    gap = metrics.replace('"loss/segmentor": 0.01,', '"loss/segmentor": "NaN",')
    (runs[1] / "metrics.jsonl").write_text(gap)
    collected = content.collect_all([*runs[:2], mid])
    entries = entries_of(collected)
    assert [entry.runs for entry in entries] == [(0,), (1,), (2,), (0, 1, 2)]
    loss = catalogue.metric("loss/segmentor")
    style = {"label": "", "color": "#000000"}
    own = [curve(entry, loss, collected["runs"], **style) for entry in entries[:3]]
    assert [one and one.last_step for one in own] == [400, 400, 200]
    mean = curve(entries[3], loss, collected["runs"], **style)
    assert mean is not None and (mean.runs, mean.without) == ((0, 1), (2,))
    assert mean.line.steps[[0, -1]].tolist() == [10, 400]
    assert mean.line.values[-1] == pytest.approx(1 / 400)
    assert np.flatnonzero(np.isnan(mean.line.values)).tolist() == [9], "a gap, as in the one curve"
    page = render(collected)
    assert "no value at step 400, so in no mean: mid" in page
    # of class IoU: mean, lowest and highest of the two that have the newest evaluation
    assert "59.0 (54.0 to 64.0)" in page


def test_means_are_shown_first_where_there_are_many_runs(runs: list[Path], tmp_path: Path) -> None:
    few = entries_of(content.collect_all(runs))
    assert [entry.is_shown for entry in few] == [True, True, True, False]
    more = [write_run(tmp_path / "more" / str(seed), seed) for seed in (3, 4)]
    entries = entries_of(content.collect_all([*runs, *more]))
    assert [entry.name for entry in entries if entry.is_shown] == [
        "won",
        "mean: toy, adversarial, seeds 0, 1, 3, 4",
    ]
    assert entries[-1].color == entries[0].color


def points(svg: str, place: int) -> np.ndarray:
    """The (x, y) of the curve of an entry, in pixels."""
    group = re.search(rf'<g class="entry-{place}">.*?<path d="([^"]*)"', svg, re.DOTALL)
    assert group is not None
    return np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", group[1]), float)


@pytest.mark.parametrize("num_runs", [1, 2])
def test_no_two_curves_of_a_panel_look_alike(tmp_path: Path, num_runs: int) -> None:
    run_dirs = [tmp_path / f"r{run}" for run in range(num_runs)]
    names = ("data", "exchange", "forward", "backward", "optimizer")
    for run, run_dir in enumerate(run_dirs):
        run_dir.mkdir()
        values = {f"{catalogue.SECTION}{name}": 1.0 + place for place, name in enumerate(names)}
        rows = [json.dumps({"step": step, **values}) for step in (1, 2, 3)]
        (run_dir / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        (run_dir / "config.yaml").write_text(yaml.safe_dump({"batch_size": 1 + run}))
    assert main(["report", *map(str, run_dirs), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    figure = next(part for part in page.split("<figure>") if "Sections of a step" in part)
    svg, legend = figure.split("</svg>")
    drawn = re.findall(
        r'<path d="[^"]*"[^>]*style="fill: none; ([^"]*stroke-width: 1.8[^"]*)"', svg
    )
    assert len(drawn) == len(set(drawn)) == len(names) * num_runs
    assert svg.count("<title>") == len(drawn)
    # and the legend tells of each curve which it is
    marks = re.findall(r'<i class="swatch[^"]*" style="([^"]*)"', legend)
    assert len(marks) == len(set(marks)) == len(drawn)


def test_a_panel_draws_each_value_at_its_place() -> None:
    values = [0.1, 0.9, math.nan, 0.5]
    line = line_of(values, name="entry-7")
    svg = panel_svg(catalogue.Panel("A & <b>", "score", is_share=True), [line])
    assert "<b>" not in svg and "NaN" not in svg and "inf" not in svg
    found = points(svg, 7)
    assert found.shape == (3, 2)
    x, y = found.T  # equal steps, and heights in proportion to the values
    assert (x[2] - x[0]) / (x[1] - x[0]) == pytest.approx(3, abs=0.02)
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx((0.5 - 0.1) / (0.9 - 0.1), abs=0.01)
    assert svg == panel_svg(catalogue.Panel("A & <b>", "score", is_share=True), [line])


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb or #rgb, by WCAG 2.1: 1 to 21."""
    shades = []
    for text in (one, other):
        digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
        share = np.array(list(bytes.fromhex(digits))) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        shades.append(float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)
    return max(shades) / min(shades)


def test_what_is_written_and_drawn_can_be_seen_in_both_themes() -> None:
    text = style([])
    light, dark = text.split("@media (prefers-color-scheme: dark)", 1)
    roots = [dict(re.findall(r"--([\w-]+): (#[0-9a-fA-F]+)", part)) for part in (light, dark)]
    runs = dict(re.findall(r"--(run-\d+): (#\w+);", css_colors().split("@media")[0]))
    roots = [runs | roots[0], runs | roots[0] | roots[1]]
    roots[1] |= dict(re.findall(r"--(run-\d+): (#\w+);", css_colors().split("@media")[1]))
    assert len(runs) == len(COLORS) and roots[0]["paper"] != roots[1]["paper"]
    for root, of_curves in zip(roots, (1.9, 3), strict=True):
        for name in ("ink", "dim", "link"):
            assert contrast(root[name], root["paper"]) > 4.5, name
        for box in ("bad", "good", "open"):
            assert contrast(root["ink"], root[box]) > 4.5, box
        for name in runs:
            assert contrast(root[name], root["paper"]) > of_curves, name
    # nothing of a drawing has a colour of its own, which one of the pages would swallow
    svg = panel_svg(catalogue.Panel("a", "b", reference=(0.5, "c")), [line_of([0.1, 0.9])])
    assert not re.findall(r"(?:stroke|fill): #(?!b0b0b0)\w+", svg) and "var(--run-4)" in svg


def test_a_confusion_matrix_is_in_shares_of_the_true_class() -> None:
    few = confusion_matrix(["a", "b"], np.array([[90.0, 10.0], [0.0, 0.0]]))
    assert "a taken for b: 10.0 % (10 pixels)" in few and ">90.0<" in few
    assert "b taken for a: 0.0 % (0 pixels)" in few
    many = np.eye(60) * 5
    many[3, 7] = 15
    text = confusion_matrix([f"c{i}" for i in range(60)], many)
    assert text.count("<li>") == 1 and "c3 taken for c7: 75.0 % (15 pixels)" in text
    assert "<td" not in text and "data:image/png" in text


# Runs in the page, whose own policy forbids scripts and is taken out for that, when it is drawn:
# works the controls, and leaves what it saw where --dump-dom shows it
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_FIRST = """<script>
const seen = {};
const count = (query) => document.querySelectorAll(query).length;
const nodes = (query) => [...document.querySelectorAll(query)];
const shown = (query) => nodes(query).filter((n) => n.getClientRects().length).length;
"""
_LAST = """
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>"""
PROBE = """
seen.titles = nodes("h2").map((h) => h.textContent);
seen.charts = count(".charts figure");
seen.overflow = document.documentElement.scrollWidth - innerWidth;
seen.cut = nodes("figure svg").filter((s) => s.getBoundingClientRect().right > innerWidth).length;
seen.thin = Math.min(...nodes("figure svg").map((s) => s.getBoundingClientRect().width));
seen.bad = nodes("path, line, rect, text").filter((n) => /NaN|Infinity/.test(n.outerHTML)).length;
seen.of = [0, 1, 2, 3].map((place) => shown(`svg .entry-${place}`));
seen.columns = shown(".bars th");
document.getElementById("show-0").click();
document.getElementById("show-3").click();
seen.ofAfter = [0, 1, 2, 3].map((place) => shown(`svg .entry-${place}`));
seen.columnsAfter = shown(".bars th");
seen.history = nodes("details .heat")[0].textContent;
seen.cells = nodes(".bars td[title]").map((t) => t.title);
seen.confusion = nodes(".heat td[title]").map((t) => t.title);
seen.images = nodes(".gallery img").map((i) => i.naturalWidth);
seen.verdicts = nodes(".verdict strong").map((v) => v.textContent);
seen.table = nodes("#runs ~ .scroll td").map((v) => v.textContent);
seen.best = nodes("#runs ~ .scroll td.best").map((v) => v.textContent);
seen.hover = nodes("svg .entry-0 > title").map((t) => t.textContent);
seen.scripts = count("script");
"""


def look(page: Path, width: int, probe: str = PROBE) -> dict[str, Any]:
    """What the probe saw in a window of so many pixels."""
    probed = page.with_name(f"probed-{width}.html")
    text = _POLICY.sub("", page.read_text())
    probed.write_text(text.replace("</body>", _FIRST + probe + _LAST + "</body>"))
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
    assert seen["bad"] == 0 and seen["thin"] > 300
    assert seen["overflow"] <= 0 and seen["cut"] == 0  # nothing is wider than the window
    sections = ["Runs", "Health", "Curves", "IoU of each class", "Confusion matrix", "Predictions"]
    sections.append("Pseudo-labels")
    assert seen["titles"] == [*sections, "What differs between the configurations", "Configuration"]
    metrics = {name for run in runs for name in content.collect(run)["series"]}
    assert seen["charts"] == len(catalogue.panels_of(metrics))
    for run, name, value in itertools.product(("s0", "s1", "won"), CLASSES, (54.0, 64.0)):
        if (run == "s1") == (value == 64.0):
            assert f"{run}, {name}: {value} %" in seen["cells"]
    assert "step 200step 400sky52.054.0" in seen["history"]
    assert f"sky taken for {HOSTILE}: 10.0 % (10 pixels)" in seen["confusion"]
    assert min(seen["of"][:3]) > 0 and seen["of"][3] == 0, "runs, and no mean at first"
    assert seen["ofAfter"][0] == 0 < seen["ofAfter"][3] and seen["ofAfter"][1:3] == seen["of"][1:3]
    assert seen["columns"] == seen["columnsAfter"] == 4
    assert seen["images"] == 6 * [60]
    assert [text.split(": ")[0] for text in seen["verdicts"]] == ["won", "won"]
    assert "65.0 ± 7.1" in seen["table"] and seen["best"].count("70.0") == 1
    assert (
        "s0, total: 0.003 at step 400" in seen["hover"] or "s0: 0.003 at step 400" in seen["hover"]
    )
    assert seen["scripts"] == 1  # the probe: no class name became one


def test_the_page_says_what_cannot_be_told_yet(tmp_path: Path) -> None:
    early = write_run(tmp_path / "early", 0, num_rows=20)  # 200 steps
    rows = (early / "metrics.jsonl").read_text().splitlines(keepends=True)
    (early / "metrics.jsonl").write_text("".join(rows[:8]))
    page = render(content.collect_all([early]))
    (verdict,) = re.findall(r'<div class="(verdict[^"]*)">([^<]*)</div>', page)
    assert verdict[0] == "verdict open"
    assert verdict[1].endswith("Too early to tell: the discriminator is blind.")
    assert 'title="early: the discriminator is blind? Too early to tell"' in page
    assert "too early to tell for 1 of" in page
    (early / "metrics.jsonl").write_text("")
    page = render(content.collect_all([early]))
    assert "<p>No signals yet.</p>" in page and '<div class="verdict' not in page
    assert "<p>No rows yet.</p>" in page


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces' own, of pydantic
@pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="pip install -e '.[reports]'"
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
    assert [(plot["chartTitle"], plot["metrics"]) for plot in plots] == [
        (panel.title, [metric.name for metric in drawn])
        for panel, drawn in catalogue.panels_of(metrics)
    ]
    assert all(plot["xAxis"] == "step" for plot in plots)
    (chosen,) = grids[0]["runSets"][0]["filters"]["filters"]
    assert (chosen["key"], chosen["op"], chosen["value"]) == (
        {"section": "run", "name": "name"},
        "IN",
        ["id0", "id1", "id2"],
    )
    media = [panel["config"] for panel in grids[2]["panelBankSectionConfig"]["panels"]]
    names = [["samples/img_1"], ["masks/img_1"], ["pseudo_labels/unlabelled_1"]]
    assert [config["mediaKeys"] for config in media] == names
