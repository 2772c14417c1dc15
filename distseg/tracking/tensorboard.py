"""The run's curves and pictures as TensorBoard event files, where that is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError


def check_installed() -> None:
    """Raise InputError when the package that writes event files is not there."""
    if importlib.util.find_spec("tensorboardX") is None:
        action = "pip install -e '.[tensorboard]' in the repository, or tracking.tensorboard=false"
        raise InputError(
            "tracking.tensorboard=true, and tensorboardX is not installed", "tensorboardX", action
        )


class TensorBoard:
    """Event files in `folder`; a thread of tensorboardX writes them.

    resume_step: the checkpoint's step that training goes on from; TensorBoard then drops what it
    had after that.
    """

    def __init__(self, folder: Path, resume_step: int | None):
        check_installed()
        from tensorboardX import SummaryWriter

        # everything of a run that starts anew, and what follows the checkpoint of one that goes on
        purge_step = 0 if resume_step is None else resume_step + 1
        # files are named by the second; a restart must not write into the file of the attempt
        # before
        self._writer: Any = SummaryWriter(
            str(folder), purge_step=purge_step, filename_suffix=f".from-{purge_step}"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """One point for every value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Path | np.ndarray, caption: str) -> None:
        """A picture file, or uint8 (H, W, 3) RGB."""
        if isinstance(picture, Path):
            from PIL import Image

            with Image.open(picture) as file:
                # event files hold pixels, and cannot point to a file
                picture = np.asarray(file.convert("RGB"))
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def finish(self, exit_code: int) -> None:
        """Write out what is left."""
        self._writer.close()
