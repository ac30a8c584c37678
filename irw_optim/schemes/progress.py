"""A progress bar where somebody watches, on a terminal or in a notebook; nothing otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

from irw_optim.notebook import in_a_notebook


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """Yield a function that advances a bar of ``total`` steps, and may say what goes on now.

    On a terminal it is a bar of rich's on stderr, where rich is installed; in a notebook one of the
    browser's own, which needs no widgets.
    """
    if shown and in_a_notebook():
        with _in_the_browser(title, total) as advance:
            yield advance
        return
    if shown:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:  # the extra "report" has it
            shown = False
    if not shown:
        yield lambda number, title=None: None
        return
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

    bar = display(html(), display_id=True)

    def advance(number: int, now: str | None = None) -> None:
        nonlocal title, done, drawn
        title, done = now or title, done + number
        if now or time.monotonic() - drawn > 0.1:  # each drawing is a message to the browser
            bar.update(html())
            drawn = time.monotonic()

    try:
        yield advance
    finally:
        bar.update(HTML(""))
