"""Losses in plain PyTorch, as sums and counts over this process's pixels.

Means are taken elsewhere, over all ranks: a mean over one rank's own valid pixels is not the mean
over the batch. Nothing here knows of ranks or of the configuration.
"""

from distseg.losses.predicted import Predicted, Targets
from distseg.losses.terms import Term

__all__ = ["Predicted", "Targets", "Term"]
