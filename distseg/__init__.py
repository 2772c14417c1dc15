"""Adversarial training of semantic segmentation networks, on one machine or many.

From Python, with the names and numbers of the command line:

    import distseg

    result = distseg.fit(preset="toy", run_dir="runs/toy", steps=200)
    result.scores["val/mean_iou"]                     # as in runs/toy/evaluation.json
    trained = distseg.load("runs/toy", checkpoint="best")
    trained.predict("picture.jpg")                    # (H, W) uint8 indices into trained.classes
    trained.probabilities(array)                      # (C, H, W) float32, of (H, W, 3) uint8 RGB
    trained.confidence("picture.jpg")                 # (H, W): how real the discriminator finds it
    trained.evaluate(shards="data/other")             # scores by name, as `distseg evaluate`
    tuned = distseg.fit(preset="stanford", segmentor={"init": "runs/toy", "freeze": ["encoder"]})

The parts, for a loop of your own:

    from distseg.config.loading import load                         # presets and keys -> Config
    from distseg.data.samples import SampleSet, open_reader         # shards -> arrays
    from distseg.data.stream import TrainStream                     # the endless order of batches
    from distseg.distributed.ranks import joined                    # with joined() as ranks: ...
    from distseg.losses import Predicted, Term                      # terms of the loss
    from distseg.models import build_discriminator, build_segmentor
    from distseg.parallel import wrap                               # network -> learner
    from distseg.train.inputs import Data, open_data, open_streams  # all that a Config reads
    from distseg.train.batch import Images
    from distseg.train.schedules import phase                       # what a step updates
    from distseg.train.step import Pair, training_step              # gradients of a step
    from shards.maps import write_maps                              # samples -> HDF5
    from shards.pack import pack                                    # HDF5 -> shards

Nothing is imported before it is used: `import distseg` alone takes no time.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["InputError", "Trained", "fit", "load"]

# name -> the module that it is in
_PLACES = {
    "InputError": "shards.errors",
    "Trained": "distseg.api",
    "fit": "distseg.train.run",
    "load": "distseg.api",
}


# Python asks here for names that the module does not have (PEP 562): so `import distseg` costs no
# torch, which `distseg --help` and the launchers need not wait for.
def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'distseg' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
