"""What is shown in a notebook or on a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def progress_bar(
    title: str, total: int, shown: bool
) -> AbstractContextManager[Callable[..., None]]:
    """Give a function that advances a bar, and may say what goes on now."""
    if shown and in_a_notebook():
        return _in_the_browser(title, total)
    if shown and find_spec("rich"):
        return _on_a_terminal(title, total)
    return nullcontext(lambda number, title=None: None)


@contextmanager
def _on_a_terminal(title: str, total: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda number, title=None: progress.update(task, advance=number, description=title)


@contextmanager
def _in_the_browser(title: str, total: int) -> Iterator[Callable[..., None]]:
    from IPython.display import HTML, display

    done, drawn = 0, time.monotonic()

    def html() -> HTML:
        return HTML(f'<progress value="{done}" max="{total}"></progress> {escape(title)}')

    bar = display(html(), display_id=True)  # the browser's own, which needs no widgets

    def advance(number: int, now: str | None = None) -> None:
        nonlocal title, done, drawn
        title, done = now or title, done + number
        if now or time.monotonic() - drawn > 0.1:
            bar.update(html())
            drawn = time.monotonic()

    try:
        yield advance
    finally:
        bar.update(HTML(""))
