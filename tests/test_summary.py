"""Tables of evaluations: mean and spread by hand, rows by configuration, and only like with
like.
"""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path

import pytest

from distseg.cli import main
from distseg.config import loading
from distseg.evaluate.summary import overview, read, rows, to_json, to_latex, to_markdown
from shards.errors import InputError

SCORES = {
    "step": 900,
    "data": "toy",
    "split": "val",
    "num_images": 4,
    "scales": [1.0],
    "horizontal_flip": False,
}


@functools.cache
def yaml_of(*overrides: str) -> str:
    """A run's configuration, in a directory RUN_DIR."""
    return loading.to_yaml(loading.load(["data.shards=shards", "run_dir=RUN_DIR", *overrides]))


def finished(folder: Path, mean_iou: float, *overrides: str, **more: object) -> Path:
    """A run directory with what a table is made of."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml_of(*overrides).replace("RUN_DIR", str(folder)))
    scores = {
        "val/mean_iou": mean_iou,
        "val/pixel_accuracy": 0.5,
        "val/iou/sky": mean_iou,
        "val/iou/a&b": None,
    }
    (folder / "evaluation.json").write_text(json.dumps({**SCORES, **scores, **more}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of one setting and one of another, at other places, with other amounts of
    checkpoints.
    """
    plain = ["mode=supervised", "checkpoint.keep_last=1"]
    made = [
        finished(tmp_path / f"plain{seed}", iou, *plain, f"seed={seed}")
        for seed, iou in enumerate((0.7, 0.74, 0.72))
    ]
    return [*made, finished(tmp_path / "adversary", 0.731, "loss.adv_weight=0.01")]


def test_seeds_of_one_configuration_are_one_row_with_mean_and_sample_deviation(
    runs: list[Path],
) -> None:
    plain, adversary = rows([read(path) for path in runs])
    assert plain.seeds == (0, 1, 2) and adversary.seeds == (0,)
    assert (plain.name, adversary.name) == (
        "mode=supervised",
        "mode=adversarial",
    )
    content = json.loads(to_json([plain, adversary]))
    scores = content[0]["scores"]["val/mean_iou"]
    assert scores["mean"] == pytest.approx(0.72) and scores["spread"] == pytest.approx(
        statistics.stdev((0.7, 0.74, 0.72))
    )
    assert (
        scores["values"] == [0.7, 0.74, 0.72]
        and content[1]["scores"]["val/mean_iou"]["spread"] is None
    )
    assert content[0]["scores"]["val/iou/sky"]["values"] == [0.7, 0.74, 0.72]
    assert "val/iou/a&b" not in content[0]["scores"], "absent from a run, so no mean is defined"


def test_a_seed_that_is_there_twice_counts_once(runs: list[Path], tmp_path: Path) -> None:
    again = finished(tmp_path / "again", 0.8, "mode=supervised", "seed=0")
    (once,) = rows([read(runs[0]), read(again)])
    assert to_markdown([once]).splitlines()[-1].endswith("| 1 | 75.0 | 50.0 |")
    (row,) = rows([read(path) for path in (runs[0], runs[1], again)])
    assert "| 2 | 74.5 ± 0.7 |" in to_markdown([row]) and r"& 2 & $74.5 \pm 0.7$" in to_latex([row])
    assert json.loads(to_json([row]))[0]["scores"]["val/mean_iou"] == {
        "mean": pytest.approx(0.745),
        "values": [0.7, 0.74, 0.8],
        "spread": pytest.approx(statistics.stdev((0.75, 0.74))),
    }


def test_what_a_row_differs_in_is_its_name(runs: list[Path], tmp_path: Path) -> None:
    other = finished(tmp_path / "other", 0.5, "loss.adv_weight=0.3", "segmentor_optimizer.lr=0.1")
    same = finished(
        tmp_path / "same",
        0.5,
        "mode=supervised",
        "semi.threshold=0.1",
        "discriminator_optimizer.lr=1",
        "seed=9",
    )
    table = rows([read(path) for path in (*runs, other, same)])
    assert [row.name for row in table] == [
        "mode=supervised, segmentor_optimizer.lr=0.001",
        "loss.adv_weight=0.01, mode=adversarial, segmentor_optimizer.lr=0.001",
        "loss.adv_weight=0.3, mode=adversarial, segmentor_optimizer.lr=0.1",
    ]
    assert table[0].seeds == (0, 1, 2, 9), (
        "a supervised run has no use for what was said of an adversary"
    )
    assert r"segmentor\_optimizer.lr=0.1" in to_latex(table)


def test_markdown_and_latex_hold_the_same_figures(runs: list[Path]) -> None:
    table = rows([read(path) for path in runs])
    assert to_markdown(table).splitlines() == [
        "| runs | seeds | mIoU | pixel accuracy |",
        "|---|---:|---:|---:|",
        "| mode=supervised | 3 | 72.0 ± 2.0 | 50.0 ± 0.0 |",
        "| mode=adversarial | 1 | 73.1 | 50.0 |",
    ]
    assert to_latex(table).splitlines() == [
        "% runs & seeds & mIoU & pixel accuracy",
        r"mode=supervised & 3 & $72.0 \pm 2.0$ & $50.0 \pm 0.0$ \\",
        r"mode=adversarial & 1 & $73.1$ & $50.0$ \\",
    ]


def test_a_file_of_another_evaluation_is_read_with_its_runs_configuration(
    runs: list[Path], capsys: pytest.CaptureFixture
) -> None:
    other = runs[0] / "evaluation-step-00000900-val-flip.json"
    other.write_text(json.dumps({**SCORES, "val/mean_iou": 0.9, "horizontal_flip": True}))
    assert main(["summarize", str(other), "--format", "latex"]) == 0
    assert r"& 1 & $90.0$ \\" in capsys.readouterr().out
    assert main(["summarize", *map(str, runs[:3])]) == 0
    assert "72.0 ± 2.0" in capsys.readouterr().out


def test_a_file_that_calls_the_flip_by_its_old_name_compares(runs: list[Path]) -> None:
    of = [runs[0] / "evaluation-step-00000900-val-mirror.json"]
    of += [runs[1] / "evaluation-step-00000900-val-flip.json"]
    for file, name in zip(of, ("mirror", "horizontal_flip"), strict=True):
        scores = {key: value for key, value in SCORES.items() if key != "horizontal_flip"}
        file.write_text(json.dumps({**scores, "val/mean_iou": 0.9, name: True}))
    (row,) = rows([read(file) for file in of])
    assert row.seeds == (0, 1)
    with pytest.raises(InputError, match="horizontal_flip is False"):
        rows([read(of[0]), read(runs[1])])


def test_different_numbers_of_steps_are_allowed_and_said(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["summarize", *map(str, runs[:2])]) == 0
    assert "steps" not in capsys.readouterr().err
    shorter = finished(tmp_path / "shorter", 0.6, "mode=supervised", "seed=3", step=600)
    assert main(["summarize", *map(str, runs[:2]), str(shorter)]) == 0
    note = f"different numbers of steps: 600 ({shorter}/evaluation.json), "
    note += f"900 ({runs[0]}/evaluation.json)"
    assert note in capsys.readouterr().err


def test_only_like_is_compared(runs: list[Path], tmp_path: Path) -> None:
    first = read(runs[0])
    for number, (key, value) in enumerate(
        {"split": "test", "num_images": 5, "horizontal_flip": True, "val/iou/x": 1.0}.items()
    ):
        other = read(finished(tmp_path / f"other{number}", 0.5, **{key: value}))
        with pytest.raises(InputError, match=key if not key.startswith("val") else "classes"):
            rows([first, other])
    with pytest.raises(InputError, match="twice"):
        rows([first, read(runs[1]), read(runs[0] / "evaluation.json")])


def test_what_is_no_evaluation_is_refused(tmp_path: Path, runs: list[Path]) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"val/mean')
    for path in (tmp_path, tmp_path / "none", tmp_path / "list.json", tmp_path / "cut.json"):
        with pytest.raises(InputError, match="no evaluation in"):
            read(path)
    (runs[0] / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml"):
        read(runs[0])


def test_an_overview_says_how_many_classes_count() -> None:
    report = {
        "val/mean_iou": 0.5,
        "val/num_classes_counted": 2,
        "confusion": [[1, 0, 0]] * 3,
        "val/trimap_iou": None,
    }
    assert overview(report) == [
        "mIoU                     50.0%  mean over 2 of 3 classes in labels or predictions"
    ]
    assert overview(report | {"num_images": 1})[-1] == "of one image, so without intervals"
    report["intervals_95"] = {"val/mean_iou": [0.4, 0.625]}
    assert "50.0%  (40.0% to 62.5%)" in overview(report)[0]


def test_a_file_of_an_earlier_version_is_read_under_todays_names(
    runs: list[Path], tmp_path: Path
) -> None:
    """`mirror` was the flip, and `boundary_iou` what is called trimap IoU now."""
    old = finished(tmp_path / "old", 0.5, "mode=supervised", "seed=5")
    content = json.loads((old / "evaluation.json").read_text())
    content["mirror"] = content.pop("horizontal_flip")
    (old / "evaluation.json").write_text(json.dumps(content | {"val/boundary_iou": 0.25}))
    new = finished(tmp_path / "new", 0.5, "mode=supervised", "seed=6", **{"val/trimap_iou": 0.75})
    (row,) = rows([read(old), read(new)])
    assert row.values["val/trimap_iou"] == (0.25, 0.75)
    header, _, cells = to_markdown([row]).splitlines()
    assert "| trimap IoU |" in header and "boundary" not in header
    assert cells.endswith("| 50.0 ± 35.4 |")


def test_a_run_alone_is_called_by_its_data(tmp_path: Path) -> None:
    """Its preset may be one that it was only begun from, or none."""
    run = finished(tmp_path / "run", 0.7, "preset=stanford", data="CamVid")
    (own,) = rows([read(run)])
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("preset: stanford", "preset: null"))
    (without,) = rows([read(run)])
    assert own.name == without.name == "CamVid"


def test_data_of_one_name_and_other_content_do_not_compare(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / f"run{number}", 0.7, f"seed={number}", **more)
        for number, more in enumerate(({"data_sha256": "a" * 64}, {"data_sha256": "b" * 64}, {}))
    ]
    with pytest.raises(InputError, match="data_sha256 is bbb"):
        rows([read(run) for run in runs[:2]])
    # of an earlier version, which did not say
    assert rows([read(runs[0]), read(runs[2])])[0].seeds == (0, 2)
