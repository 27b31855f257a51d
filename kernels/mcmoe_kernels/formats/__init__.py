"""Formats of weight codes, each a module of this folder: it is known because it is here.

A module says what it adds by `format.register`. What runs on a GPU is imported when it is asked
for, so that packing and a CPU need no Triton.
"""

import importlib
import pkgutil

from mcmoe_kernels.formats.format import FORMATS


def discover() -> tuple[int, ...]:
    """Import every module of the folder; the numbers of all formats."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(sorted(FORMATS))


# What a table of widths may hold: 1 to 4 are codes of as many bits.
WIDTHS = discover()

__all__ = ["FORMATS", "WIDTHS", "discover"]
