"""`distseg report`: one HTML page about one or several runs that needs neither a network nor
another file.
"""

from __future__ import annotations

from pathlib import Path

from distseg.report.content import collect_all
from distseg.report.page import render
from shards.errors import InputError
from shards.files import published

__all__ = ["run"]


def run(runs: list[Path], out: Path | None, to_wandb: bool) -> int:
    """Write the page, and build the W&B report with the same panels where that is asked for; the
    exit code.

    out: by default report.html in the run's directory, for several runs in the working directory.
    Raises InputError for a folder that holds no run.
    """
    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    # said before any run is read
    if out.is_dir():
        raise InputError(
            f"--out {out}, which is a folder",
            "the name of a file",
            f"write --out {out}/report.html",
        )
    collected = collect_all(runs)
    page = render(collected)
    # a page that someone has open is replaced whole
    with published(out) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"wrote {out} ({len(page) / 1e6:.1f} MB): open it in a browser, or send it as it is")
    # the page first: it needs nobody, and stays whatever W&B answers
    if to_wandb:
        from distseg.report.wandb_report import publish

        print(publish(runs, collected, out.with_suffix(".wandb.json")))
    return 0
