"""The GPU check, dry: its parts in small sizes on the CPU, and what becomes of one that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import ON_PURPOSE, PARTS
from tests.ranks import PATIENCE


def run(folder: Path, *parts: str) -> tuple[int, dict, str]:
    arguments = ["--device", "cpu", "--quick", "--out", str(folder), "--parts", *parts]
    code = gpu.main([*arguments, "--minutes", str(gpu.MINUTES * PATIENCE)])
    report = json.loads((folder / "gpu_check.json").read_text())
    return code, report, (folder / "gpu_check.md").read_text()


@pytest.fixture
def here() -> None:
    """The check goes to the repository's root."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(gpu.ROOT)
        yield


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_stops_no_other(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report, shown = run(tmp_path, "broken", "stuck", "step")
    assert code == 1
    found = {part.pop("part"): part for part in report["parts"]}
    assert list(found) == ["machine", "broken", "stuck", "step"]
    statuses = [part["status"] for part in found.values()]
    assert statuses == ["done", "failed", "late", "done"], report
    assert found["broken"]["error"] == "as asked for"
    assert found["stuck"]["error"] == f"stopped after {ON_PURPOSE['stuck'].limit:.0f} s, its limit"
    # what they had noted until then
    assert found["broken"]["values"]["before"] == 1 and "before" in found["stuck"]["values"]
    step = found["step"]["values"]
    assert step["ours, bf16, ms"] > 0 and 0 < step["ours, bf16, share of peak"] < 1.5
    assert report["commit"] != "unknown" and found["machine"]["values"]["torch"]
    for text in ("A dry run in small sizes", "| stuck | late |", "| ours, bf16, ms |"):
        assert text in shown
    assert "part 4 of 4: step, at most 100 s; all done at about" in capsys.readouterr().err
    assert "RuntimeError: as asked for" in (tmp_path / "broken.log").read_text()


@pytest.mark.slow
def test_every_part_is_done(here: None, tmp_path: Path) -> None:
    code, report, _ = run(tmp_path, *PARTS)
    assert code == 0, report
    values = {part["part"]: part["values"] for part in report["parts"]}
    assert values["tests"]["counts"]["passed"] > 3 and not values["tests"]["counts"]["failed"]
    shares = [value for key, value in values["sections"].items() if "share of the step" in key]
    assert sum(shares) == pytest.approx(1)


def test_no_time_left_is_said_and_a_missing_device_ends_it(tmp_path: Path) -> None:
    outcomes = gpu.check(["step", "tests"], "cpu", True, tmp_path, end=0.0)
    assert [each["status"] for each in outcomes] == ["left out", "left out"]
    assert len(gpu.check(["machine", "step"], "cpu", True, tmp_path, end=0.0)) == 1


def test_the_table_says_what_was_aimed_at() -> None:
    head = {"date": "2026-01-01", "commit": "abc", "device": "cuda", "quick": False}
    values = {
        "ours, bf16, ms": 20.0,
        "ours, bf16, share of peak": 0.6,
        "ours, bf16, ms at peak": 12,
    }
    values["ours, bf16, ms from to"] = [19.0, 21.5]
    common = {"status": "done", "seconds": 1.0, "error": ""}
    parts = [
        {"part": "machine", "values": {"chip": "NVIDIA H200", "driver": "580"}, **common},
        {"part": "step", "values": values, **common},
        {"part": "reference", "values": {"reference, fp32, ms": 160.0}, **common},
    ]
    shown = gpu.table(head, parts)
    for text in (
        *("chip: NVIDIA H200", "takes 20.0 ms; aimed at on an H200: 22", "160.0 ms, 8.00 times"),
        *("| ours, bf16, ms from to | 19 to 21.5 |", "share of peak | 60.0% |"),
    ):
        assert text in shown
    assert "dry run" not in shown


def test_the_time_limit_holds_what_is_expected() -> None:
    assert sum(part.expected for part in PARTS.values()) < 60 * gpu.MINUTES
    assert all(part.expected < part.limit for part in PARTS.values())
    assert gpu.missing() == []
