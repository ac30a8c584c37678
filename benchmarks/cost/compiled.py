"""What ``compile=True`` changes: processor time and memory of a step, and what its products start.

Operations are those of the products as they were traced, on the CPU and without views; kernels
those that their programs call, torch's own (matrix products) included. A stand-in for what a device
would start: no step was taken on one.
"""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import report
from benchmarks.cost.neighbours import METHODS, ours
from benchmarks.cost.steps import time_ratios
from benchmarks.models import Work, cnn, small_mlp, transformer
from irw_optim.gradients import compiled
from irw_optim.model_check import peak_bytes

STARTS = re.compile(r"(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.\w+\.\w+)\(")
PICTURES = Work("CNN with GroupNorm, B = 16", cnn, lambda: torch.randn(16, 3, 32, 32), 10)


def row(work: Work, rounds: int) -> dict[str, Any]:
    """A plain step, and ours in multiples of it, uncompiled and compiled."""
    from torch._inductor.graph import GraphLowering

    graphs, codes, build, write = [], list[str](), compiled.built, GraphLowering.save_output_code

    def built(graph: Any, tensors: Any) -> Any:
        graphs.append(graph)
        return build(graph, tensors)

    start = time.perf_counter()
    compiled.built, GraphLowering.save_output_code = built, staticmethod(codes.append)
    methods = METHODS["plain"], ours(), ours(compile=True)
    actions = [method(work.build(), *work.batch()) for method in methods]
    for _ in range(10):  # past the comparisons with autograd
        for action in actions:
            action()
    compiled.built, GraphLowering.save_output_code = build, write
    took = time.perf_counter() - start
    plain, ratios = time_ratios(*actions, rounds=rounds)
    memory, *more = [peak_bytes(action, torch.device("cpu")) for action in actions]
    found = {"model": work.name, "plain, ms": 1e3 * plain}
    for name, times, most in zip(("ours", "compiled"), ratios, more, strict=True):
        found[name] = f"{statistics.median(times):.2f} / {most / memory:.2f}"
    calls = [node.target for graph in graphs for node in graph.graph.nodes]
    operations = [c for c in calls if isinstance(c, torch._ops.OpOverload) and not c.is_view]
    kernels = sum(len(STARTS.findall(code.partition("def call(")[2])) for code in codes)
    found |= {"first ten steps, s": took, "operations": len(operations), "kernels": kernels}
    return found


def main(given: Sequence[str] | None = None) -> None:
    chosen = report.options(__doc__, given)
    with tempfile.TemporaryDirectory() as nothing_compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = nothing_compiled
        works = small_mlp(64), small_mlp(1024), PICTURES, transformer(64, 16, 3, 64)
        rows = [row(work, rounds=20 if chosen.fast else 300) for work in works]
    report.save("compiled", rows, chosen.fast)
