"""The report as one HTML file that needs nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adult_report.cells import legend, table_cells
from adult_report.evaluation import METRICS
from adult_report.figures import pictures
from adult_report.findings import Finding
from adult_report.runs import PLAIN, Runs

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(path: Path, runs: Runs, findings: list[Finding], settings: dict[str, str]) -> None:
    """Write the page, with the table, the findings, the figures and how it was made.

    Args:
        path: of the HTML file; its folder is made if need be.
        runs: the results.
        findings: the sentences under the table.
        settings: what the reader must know to repeat it, by name.
    """
    page = TEMPLATES.get_template("page.html").render(
        baseline=PLAIN,
        metrics=METRICS,
        cells=table_cells(runs),
        legend=legend(runs),
        findings=findings,
        pictures=pictures(runs),
        seconds=runs.seconds(),
        settings=settings,
        seeds=runs.counted_seeds,
        people=len(runs.test),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
