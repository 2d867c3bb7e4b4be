"""Imports without what they bring along for features that are not used here; every notebook's kernel pays for them."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Inside, modules of these names are not found, as if not installed; those already loaded stay.

    Only for modules whose absence the importing package provides for. Afterwards they can be imported as ever.
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # None is Python's own mark of a module that is not to be found
    try:
        yield
    finally:
        for name in absent:
            if sys.modules[name] is None:
                del sys.modules[name]
