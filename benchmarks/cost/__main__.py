"""What a step costs.

python -m benchmarks.cost steps     against a plain step and neighbouring libraries; growth
python -m benchmarks.cost renewal   of the global weights, in plain epochs; its memory
python -m benchmarks.cost private   DP-IRW against Opacus' ghost clipping
python -m benchmarks.cost scaling   what several processes send, and a model of 8 to 1,024 GPUs
python -m benchmarks.cost compiled  what `compile=True` changes: time, and kernels started
python -m benchmarks.cost local     what `worst_off="local"`, which sends nothing, changes; --check

Each with --fast: a look that stores nothing.
"""

from benchmarks.report import command

if __name__ == "__main__":
    command(
        "benchmarks.cost", ("steps", "renewal", "private", "scaling", "compiled", "local"), __doc__
    )
