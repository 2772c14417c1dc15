"""Training, from the configuration to the evaluated run.

`distseg.train(preset="toy", ...)`, a call of this package itself, is `command.train`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Training(ModuleType):
    """This package, which can be called, too: a name stands for one thing, as on the command line.

    A function of that name in `distseg` would be lost to the first import of a module in here.
    """

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        from distseg.train.command import train

        return train(*arguments, **keys)


sys.modules[__name__].__class__ = _Training
