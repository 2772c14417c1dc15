"""Where the networks' first weights come from: another run, or what `models` finds by itself."""

from __future__ import annotations

from pathlib import Path

from distseg.models import Weights
from distseg.runs import checkpoint
from shards.errors import InputError


def initial_weights(init: str, network: str, *, adapts: bool = False) -> str | Weights:
    """What `build_segmentor` and `build_discriminator` take as `init`.

    init: a run directory stands for its best checkpoint, or its last where none was scored and
    where labels chose it that training has not, see `_default`; RUN@last, RUN@best and RUN@500 name
    one. Anything else (a word, a file) comes back as it is. network: "segmentor" (its EMA weights
    where the run has them) or "discriminator". adapts: the weights are for a run that adapts to a
    domain without labels. Raises InputError where a run has no such checkpoint or network, and
    where the checkpoint is damaged.
    """
    if init in ("imagenet", "random"):  # whatever folders lie here
        return init
    run_dir, which = Path(init), ""
    # a directory whose own name has an @ comes first
    if "@" in init and not run_dir.exists():
        name, _, which = init.rpartition("@")
        run_dir = Path(name)
        if run_dir.is_dir() and not which:
            action = f"write {name}, {name}@last, {name}@best or {name}@500"
            raise InputError(f"{network}.init={init}", "a checkpoint behind the @", action)
    if not run_dir.is_dir():
        # a file of a checkpoint is as sound as the whole; any other has no checksum
        if (run_dir.parent / checkpoint.STATE_FILE).is_file():
            checkpoint.verified(run_dir.parent)
        return init
    which, why = (which, "") if which else _default(run_dir, adapts)
    if which == "best" and checkpoint.target_of_best(run_dir):
        why = f", chosen by {checkpoint.target_of_best(run_dir)}"
    with checkpoint.opened(run_dir, which) as found:
        # the network's tensors alone, whichever strategy wrote them: an optimizer would belong to
        # other data
        part, tensors = checkpoint.read_network(found, network, f"{network}.init=random")
    source = f"{run_dir}, step {found.step}{', EMA weights' if part == 'ema' else ''}{why}"
    source += ", not verified (no checksums)" if found.caveat else ""
    # as tensors, not as a path: `models` is plain torch and knows nothing of checkpoints
    return Weights(tensors, source)


def _default(run_dir: Path, adapts: bool) -> tuple[str, str]:
    """Which checkpoint a run stands for that is named alone, and what is to be said of that."""
    best = checkpoint.read_best(run_dir / checkpoint.FOLDER)
    if not best:
        # A run that never evaluated has no best. Its last is what the user means, and the headline
        # says so.
        return "last", ""
    by = best["chosen_by"]
    # Labels of the target would reach what adapts to it by the choice of its first weights: of a
    # run that adapted itself, and of one on the source alone that was scored on the target.
    leaks = by.get("domain") == checkpoint.TARGET
    leaks |= adapts and by.get("domain") == checkpoint.OTHER
    if not leaks:
        return "best", ""
    return "last", f", its last, as labels of {by['data']} chose the best"
