"""Training, from the configuration to the evaluated run.

`distseg.train(preset="toy", ...)`, a call of this package itself, is `command.train`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Training(ModuleType):
    """This package, which can be called, too: a name stands for one thing, as on the command line.

    A function of that name in `distseg` would be lost to the first import of a module in here.
    """

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        # by its name: modules in here import from this one
        return importlib.import_module(f"{__name__}.command").train(*arguments, **keys)


sys.modules[__name__].__class__ = _Training
