"""How to choose alpha, options and a scheme; resampling or reweighting; which scores.

python -m benchmarks.schemes choosing alpha | options | schemes | held [--data law] [--fast]
python -m benchmarks.schemes scores train | time [--fast]
python -m benchmarks.schemes variance [--fast]
python -m benchmarks.schemes figures                                # from what is stored
"""

from benchmarks.report import command

if __name__ == "__main__":
    command("benchmarks.schemes", ("choosing", "scores", "variance", "figures"), __doc__)
