"""Keys of other libraries' state dicts, renamed to those of the networks here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

# a pattern, and what takes its place
Renaming = tuple[str, str | Callable[[re.Match[str]], str]]


def renamed(state: Mapping[str, Tensor], pairs: Sequence[Renaming]) -> dict[str, Tensor]:
    """The state dict with every pair applied in turn, wherever its pattern stands in a key."""
    found = {}
    for key, tensor in state.items():
        # in order: a later pattern may be meant for what an earlier one wrote
        for pattern, name in pairs:
            key = re.sub(pattern, name, key)
        found[key] = tensor
    return found
