"""When a run whose losses or gradients are not finite has to end.

Such a step changes no weights: its gradients are not finite, and the update is left out on all
ranks. So one is a blip, and the last checkpoint is sound; but a run that goes on so does nothing
more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from distseg.config.schema import Config
from distseg.tracking.catalogue import CROSS_ENTROPY, LOSS
from shards.errors import InputError


def not_finite(config: Config, step: int, values: Mapping[str, float]) -> InputError | None:
    """The error that ends the run after a logged step (from 1); None where it goes on.

    values: the step's metrics. It ends where a term of the user's own alone is not finite, after
    `max_skips` updates in a row that were left out, and at the last step with a loss that is not
    finite.
    """
    names = [name.removeprefix(LOSS) for name in values if _is_bad_loss(name, values)]
    own = [name for name in names if name in config.loss.terms]
    # where the cross entropy is finite, so are the logits: it is the term, and no divergence
    if own and math.isfinite(values.get(CROSS_ENTROPY, 0.0)):
        got = f"loss.terms.{own[0]} is {values[LOSS + own[0]]} at step {step}"
        needed = "a finite sum, and a finite count from 0 on, over all ranks"
        return InputError(got, needed, "correct the term; the run goes on with allow_changed_code")
    which = f" ({', '.join(names)})" if names else ""
    for network in ("segmentor", "discriminator"):
        in_a_row = values.get(f"skips_in_a_row/{network}", 0.0)
        if in_a_row >= config.max_skips:
            got = f"{network}: {in_a_row:.0f} non-finite gradients in a row at step {step}{which}"
            needed = f"fewer than max_skips={config.max_skips}"
            return InputError(got, needed, _advice(network))
    if names and step >= config.steps:
        got = f"losses that are not finite at the last step, {step}{which}"
        return InputError(got, "a run that ends with finite losses", _advice("segmentor"))
    return None


def _is_bad_loss(name: str, values: Mapping[str, float]) -> bool:
    return name.startswith(LOSS) and not math.isfinite(values[name])


def _advice(network: str) -> str:
    lower = f"a lower {network}_optimizer.lr, or with precision=fp32"
    return f"start again in another run_dir with {lower}; its checkpoints are sound"
