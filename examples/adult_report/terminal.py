"""The table and the findings on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adult_report.cells import legend, table_cells
from adult_report.evaluation import METRICS
from adult_report.findings import Finding
from adult_report.runs import PLAIN, Runs

STYLES = {"better": "green", "worse": "red", "no clear difference": ""}


def print_table(console: Console, runs: Runs) -> None:
    """A row for each method, mean and standard deviation over the seeds."""
    table = Table(box=None, padding=(0, 1, 1, 0), pad_edge=False)
    table.add_column("", width=14)
    for metric in METRICS:
        table.add_column(metric.name, justify="right", vertical="bottom")
    for method, row in table_cells(runs).items():
        numbers = [Text(f"{c.mean}\n{c.spread}".strip(), style=STYLES[c.verdict]) for c in row]
        table.add_row(method, *numbers)
    console.print(f"\n[bold]Test split, {runs.counted_seeds}: mean ± standard deviation[/]\n")
    console.print(table)
    for name, meaning in legend(runs).items():
        console.print(f"{name}: {meaning}", style="dim", highlight=False)
    console.print(
        f"[green]clearly better[/] and [red]clearly worse[/] than {PLAIN}, seed by seed",
    )


def print_findings(console: Console, findings: list[Finding]) -> None:
    """Headings and sentences."""
    for finding in findings:
        console.print(f"\n[bold]{finding.title}[/]")
        for sentence in finding.sentences:
            console.print(Padding(Text(f"• {sentence}"), (0, 0, 0, 2)))
