"""What an evaluation's JSON file is called by, now and in files of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# else scores do not compare
SAME_DATA = ("data", "split", "num_images", "data_sha256", "class_map")
SAME_AUGMENTATION = ("scales", "horizontal_flip", "window_px", "overlap_px")
# "boundary IoU" was the mean IoU of a trimap; today's is val/mean_boundary_iou
_RENAMED: dict[str, str] = {"mirror": "horizontal_flip", "val/boundary_iou": "val/trimap_iou"}


def short(sha256: str) -> str:
    """As much of a checksum as tells data sets of one name apart, for names of files and tables."""
    return sha256[:8]


def read(path: Path) -> dict[str, Any]:
    """The file's content under today's names.

    Raises OSError, or ValueError for what is no JSON object.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    # renamed when read, so that nothing else has to know both names
    return {_RENAMED.get(str(name), str(name)): value for name, value in content.items()}
