"""What is shown in notebooks, and whether this is one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from html import escape
from typing import Any


def in_a_notebook() -> bool:
    """Whether a notebook's kernel runs this; IPython on a terminal has none.

    >>> in_a_notebook()
    False
    """
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def html_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A plain table, which a notebook shows in its own style.

    >>> html_table(["module"], [["a < b"]])
    '<table><tr><th>module</th></tr><tr><td>a &lt; b</td></tr></table>'
    """
    lines = [_line("th", header), *(_line("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _line(cell: str, values: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(str(v))}</{cell}>" for v in values) + "</tr>"
