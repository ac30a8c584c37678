"""All experiments, one after the other; about half an hour of one core.

python -m benchmarks.experiments [--fast]      # --fast: a minute; nothing is written
"""

from importlib import import_module

from benchmarks.experiments import report

for name in ("convergence", "alignment", "outliers", "many_groups", "cost"):
    print(f"\n== {name}")
    report.main(import_module(f"benchmarks.experiments.{name}"))
