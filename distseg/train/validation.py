"""The validation losses of a run so far, and what follows from them for its course."""

from __future__ import annotations

from distseg.config.schema import ScheduleConfig
from distseg.train.schedules import num_plateaus, stops_early


class ValidationHistory:
    """One loss for each evaluation, in order; the same on every rank."""

    def __init__(self, schedule: ScheduleConfig):
        self._schedule = schedule
        # steps beside losses, as a resumed run asks whether the evaluation of its checkpoint was
        # done
        self.steps: list[int] = []
        self.losses: list[float] = []

    @property
    def stops_early(self) -> bool:
        """Whether the run ends because validation has stopped improving."""
        # asked anew each time, from losses that all ranks share: nobody has to send a decision
        return stops_early(self.losses, self._schedule)

    def add(self, step: int, loss: float) -> list[str]:
        """Take in an evaluation; returns what it changes, in words."""
        # told once, at the evaluation that changes it, and not again on resuming, which adds old
        # ones unheard
        before, had_stopped = self._num_plateaus(), self.stops_early
        self.steps.append(step)
        self.losses.append(loss)
        news = []
        if self._num_plateaus() > before:
            factor = self._schedule.plateau_factor
            news.append(f"val/loss on a plateau at step {step}: learning rates times {factor}")
        if self.stops_early and not had_stopped:
            news.append(f"val/loss no longer falls: training ends at step {step}")
        return news

    def _num_plateaus(self) -> int:
        if self._schedule.name != "plateau":
            return 0
        return num_plateaus(self.losses, self._schedule.plateau_patience)
