"""`distseg export`."""

from __future__ import annotations

from pathlib import Path

from distseg.export.formats import SUFFIXES, check_packages, export, load


def run(run_dir: Path, which: str, form: str, out: Path | None, hub_folder: Path | None) -> int:
    """`distseg export RUN`.

    Write a checkpoint's segmentor, by default as RUN/export/model.<suffix>.
    """
    from distseg.export import hub

    # before the checkpoint is read, and before a folder is made
    check_packages(form)
    trained = load(run_dir, which)
    if hub_folder is not None:
        written = hub.write_folder(run_dir, trained, form, hub_folder)
    else:
        out = out or run_dir / "export" / f"model{SUFFIXES[form]}"
        error = export(trained.segmentor, trained.metadata, form, out)
        written = [out]
        print(f"largest difference to the original on random images: {error:.1g} (probabilities)")
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
