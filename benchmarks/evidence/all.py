"""All experiments, one after the other: half an hour of one core; with --fast a minute."""

from benchmarks import report
from benchmarks.evidence import alignment, convergence, many_groups, outliers


def main(given: list[str]) -> None:
    for experiment in (convergence, alignment, outliers, many_groups):
        print(f"\n== {experiment.__name__.rpartition('.')[2]}")
        report.publish(experiment, given)
