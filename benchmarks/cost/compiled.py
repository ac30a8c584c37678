"""What ``compile=True`` changes: processor time of a step, and how many kernels its products start.

Operations are those of the products as they were traced, on the CPU and without views; kernels
those that the compiled products call, torch's own (matrix products) included. A stand-in for what a
device would start: no step was taken on one.
"""

import copy
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.cost.neighbours import METHODS, ours
from benchmarks.cost.steps import time_ratios
from benchmarks.models import Transformer, mlp
from irw_optim.gradients import compiled

STARTS = re.compile(r"(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.\w+\.\w+)\(")


def cnn() -> nn.Module:
    parts: list[nn.Module] = []
    for before, width in ((3, 16), (16, 32), (32, 32)):
        parts += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(128, 2))


def row(name: str, model: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, Any]:
    """A plain step, and the ratios of ours to it, uncompiled and compiled."""
    from torch._inductor.graph import GraphLowering

    operations, codes, build = list[int](), list[str](), compiled.built
    write = GraphLowering.save_output_code
    steps = [METHODS["plain"], ours(), ours(compile=True)]
    y, took = torch.randint(2, (len(x),)), time.perf_counter()

    def built(graph: Any, tensors: Any) -> Any:
        calls = [n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        operations.append(sum(not call.is_view for call in calls))
        return build(graph, tensors)

    compiled.built, GraphLowering.save_output_code = built, staticmethod(codes.append)
    try:
        actions = [method(copy.deepcopy(model), x, y) for method in steps]
        for _ in range(10):  # past the comparisons with autograd
            for action in actions:
                action()
    finally:
        compiled.built, GraphLowering.save_output_code = build, write
    took = time.perf_counter() - took
    plain, ratios = time_ratios(*actions, rounds=rounds)
    kernels = sum(len(STARTS.findall(code.partition("def call(")[2])) for code in codes)
    found = {"model": name, "plain, ms": 1e3 * plain, "ours": statistics.median(ratios[0])}
    found |= {"compiled": statistics.median(ratios[1]), "first ten steps, s": took}
    return found | {"operations": sum(operations), "kernels": kernels}


def main(given: Sequence[str] | None = None) -> None:
    chosen = report.options(__doc__, given)
    torch.manual_seed(0)
    tokens = torch.randint(0, 100, (64, 16))
    cases = [
        ("MLP 100-64-32-2, B = 64", mlp(100, 64, 32, 2), torch.randn(64, 100)),
        ("the same, B = 1,024", mlp(100, 64, 32, 2), torch.randn(1024, 100)),
        ("CNN with GroupNorm, B = 64", cnn(), torch.randn(64, 3, 16, 16)),
        ("transformer, 16 x 64, B = 64", Transformer(100, 64, 3), tokens),
    ]
    with tempfile.TemporaryDirectory() as nothing_compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = nothing_compiled
        rows = [row(*case, rounds=20 if chosen.fast else 300) for case in cases]
    report.save("compiled", rows, chosen.fast)
