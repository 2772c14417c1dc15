"""The validation losses of a run so far, and what follows from them for its course."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from distseg.config.schema import ScheduleConfig
from distseg.train.schedules import num_plateaus, stops_early


class Evaluation(NamedTuple):
    """What an evaluation has found, as checkpoints keep it. view: how it looked at images, see
    TestTimeAugmentation.to_dict.
    """

    step: int
    loss: float
    view: dict[str, Any]


class ValidationHistory:
    """One evaluation after the other, in order; the same on every rank.

    Losses of different views do not compare: waiting begins anew where the view has changed, and
    the plateaus until then stay.
    """

    def __init__(self, schedule: ScheduleConfig, evaluations: list[Evaluation]):
        self._schedule = schedule
        self.evaluations = evaluations

    @property
    def stops_early(self) -> bool:
        """Whether the run ends because validation has stopped improving."""
        # asked anew each time, from losses that all ranks share: nobody has to send a decision
        return stops_early(self._by_view()[-1], self._schedule)

    @property
    def num_plateaus(self) -> int:
        """How often validation has stopped improving; 0 where the learning rate does not ask."""
        if self._schedule.name != "plateau":
            return 0
        patience = self._schedule.plateau_patience
        return sum(num_plateaus(losses, patience) for losses in self._by_view())

    def add(self, evaluation: Evaluation) -> list[str]:
        """Take in an evaluation; returns what it changes, in words."""
        # told once, at the evaluation that changes it, and not again on resuming
        before, had_stopped = self.num_plateaus, self.stops_early
        self.evaluations.append(evaluation)
        news, step = [], evaluation.step
        if self.num_plateaus > before:
            factor = self._schedule.plateau_factor
            news.append(f"val/loss on a plateau at step {step}: learning rates times {factor}")
        if self.stops_early and not had_stopped:
            news.append(f"val/loss no longer falls: training ends at step {step}")
        return news

    def _by_view(self) -> list[list[float]]:
        """The losses, those of one view after the other together; the last list may be empty."""
        groups = itertools.groupby(self.evaluations, key=lambda each: each.view)
        return [[each.loss for each in of_view] for _, of_view in groups] or [[]]
