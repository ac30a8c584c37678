"""Does it help, whom, and does it do what the paper says?

python -m benchmarks.evidence unseen | sweep | report       # against other methods
python -m benchmarks.evidence convergence | alignment | outliers | many_groups | all [--fast]
"""

from benchmarks.report import command

NAMES = ("unseen", "sweep", "report")
NAMES += ("convergence", "alignment", "outliers", "many_groups", "all")

if __name__ == "__main__":
    command("benchmarks.evidence", NAMES, __doc__)
