"""What is known of a metric, and of the axes that curves are drawn into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distseg.config.forms import FormFacts

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Panel:
    """One set of axes, over training steps.

    reference: a level worth knowing, and what it is; or check: the health check whose threshold is
    that level. loss_of: whose loss on the discriminator's scores it shows, with the unit and the
    level of the run's loss.adv_form. in_picture: also drawn in a run's curves.png.
    """

    title: str
    unit: str
    reference: tuple[float, str] | None = None
    check: str = ""
    loss_of: Literal["discriminator", "segmentor", "both", ""] = ""
    is_log: bool = False
    is_share: bool = False  # from 0 to 1
    in_picture: bool = False

    def under(self, forms: Sequence[FormFacts]) -> Panel:
        """The panel of runs with these forms of loss; of several the level would be one's only."""
        if not self.loss_of:
            return self
        # runs of several forms have no unit in common, nor a level
        units = {form.unit for form in forms}
        unit = units.pop() if len(units) == 1 else "loss"
        if self.loss_of == "both":
            return replace(self, unit=unit)
        by_segmentor = self.loss_of == "segmentor"
        levels = {f.undecided_segmentor if by_segmentor else f.undecided for f in forms}
        reference = (levels.pop(), forms[0].level) if len(levels) == 1 else None
        return replace(self, unit=unit, reference=reference)


@dataclass(frozen=True)
class Metric:
    """name: in metrics.jsonl and evaluation.json. unit: nats, share (in [0, 1]), seconds, bytes,
    count, or another word.

    panel: where its curve is drawn, None: nowhere; label: its name in that panel's legend. better:
    which direction is. short: its name on the progress line, "" where it is not shown there.
    is_score: whether it is a column in tables of evaluations.
    """

    name: str
    title: str
    unit: str
    panel: Panel | None = None
    label: str = ""
    better: Better = ""
    short: str = ""
    is_score: bool = False

    def text(self, value: float | None) -> str:
        """A value for people, with its unit."""
        # a dash, as 0 is a measurement
        if value is None:
            return "–"
        if self.unit == "share":
            return f"{value:.1%}"
        if self.unit == "count":
            return f"{value:,.0f}"
        if self.unit == "bytes":
            return f"{value / 1e9:.2f} GB"
        return f"{value:.2f} s" if self.unit == "seconds" else f"{value:.3f}"

    def best(self, values: Sequence[float | None]) -> float | None:
        """The best of several values; None where none is known or no direction is better."""
        # a NaN would win or lose by its place in the list
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known or not self.better:
            return None
        return max(known) if self.better == "higher" else min(known)
