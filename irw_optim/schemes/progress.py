"""A progress bar where rich is installed and somebody watches; nothing otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a bar of ``total`` steps on stderr.

    >>> with progress_bar("scoring", total=10, shown=False) as advance:
    ...     advance(10)
    """
    if shown:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:  # the extra "report" has it
            shown = False
    if not shown:
        yield lambda _: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda number: progress.advance(task, number)
