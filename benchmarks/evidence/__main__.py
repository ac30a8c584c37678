"""Does it help, whom, and does it do what the paper says?

python -m benchmarks.evidence unseen | demo | sweep | report       # against other methods
python -m benchmarks.evidence convergence | alignment | outliers | many_groups [--fast | --again]
"""

from benchmarks.report import command

NAMES = ("unseen", "demo", "sweep", "report", "convergence", "alignment", "outliers", "many_groups")

if __name__ == "__main__":
    command("benchmarks.evidence", NAMES, __doc__)
