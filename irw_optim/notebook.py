"""Whether this is a notebook."""

from __future__ import annotations

import sys
from typing import Any


def in_a_notebook() -> bool:
    """Whether a notebook's kernel runs this; IPython on a terminal has none.

    >>> in_a_notebook()
    False
    """
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
