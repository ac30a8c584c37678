"""What is shown in a notebook or on a terminal."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from typing import Any


def in_a_notebook() -> bool:
    """Whether a notebook's kernel runs this; IPython on a terminal has none."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def html_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A plain table."""

    def line(cell: str, values: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(str(v))}</{cell}>" for v in values) + "</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """Give a function that advances a bar, and may say what goes on now."""
    if not (shown and find_spec("tqdm")):  # the extra "report" has it
        yield lambda number, title=None: None
        return
    from tqdm.std import tqdm  # as text, in a notebook too: its other bar needs a widget

    # Not into a file; a notebook's stream is no terminal either.
    hidden = False if in_a_notebook() else None
    with tqdm(total=total, desc=title, leave=False, disable=hidden) as bar:

        def advance(number: int, now: str | None = None) -> None:
            if now:
                bar.set_description(now)
            bar.update(number)

        yield advance
