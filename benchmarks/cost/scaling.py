"""How a step scales to 1,024 GPUs, by a model: no cluster was measured.

First the messages that the model is about are counted in two processes. Then every collective takes
latency + bytes / bandwidth, with latencies as NCCL's own cost model has them, and computation takes
floating-point operations / (peak * utilisation). All figures and their sources are in this file.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.cost import traffic
from benchmarks.cost.traffic import Message, messages

GPUS = (8, 64, 256, 1024)
GPUS_PER_NODE = 8
PEAK = 989e12
"""Dense bfloat16 operations a second of an H100 SXM (NVIDIA H100 data sheet)."""
EFFICIENCY = 0.8
"""Share of the wires' bandwidth that a large collective gets: an assumption."""
WEIGHING = 1.5
"""An IRW step's computation over a plain one's: of larger models on a CPU (docs/performance.md)."""


class Network(NamedTuple):
    """Bandwidths in bytes a second and direction: of a GPU in its node, and of a node's eight."""

    name: str
    within: float
    between: float


NETWORKS = (
    # NVLink 4 has 900 GB/s in both directions together (H100 data sheet); a DGX H100 has eight
    # ConnectX-7 of 400 Gb/s for its eight GPUs (DGX H100 user guide).
    Network("NVLink, 8 x NDR InfiniBand of 400 Gb/s a node", 450e9, 8 * 50e9),
    Network("NVLink, Ethernet of 100 Gb/s a node", 450e9, 12.5e9),
)

# Seconds a step within a node and between nodes: `hwLat` in src/graph/tuning.cc of NCCL 2.27, for
# the protocols LL (half of whose bytes are flags) and Simple.
LATENCIES = {
    ("ring", "LL"): (0.6e-6, 2.7e-6),
    ("ring", "Simple"): (3.4e-6, 14.0e-6),
    ("tree", "LL"): (0.6e-6, 5.0e-6),
    ("tree", "Simple"): (4.0e-6, 14.0e-6),
}
CARRIED = {"LL": 0.5, "Simple": 1.0}


@dataclass(frozen=True)
class Model:
    """A model, and a step of it on one GPU.

    Attributes:
        operations: floating-point operations of forward and backward for one sample.
        batch: samples of one GPU.
        utilisation: share of `PEAK`; an assumption.
        factors: numbers in one sample's layer inputs and outputs, and in those of the last layer.
        lengths: positions in a sample, and those that the last layer sees.
        last: parameters of the last layer.
    """

    name: str
    parameters: float
    operations: float
    batch: int
    utilisation: float
    factors: tuple[float, float]
    lengths: tuple[int, int]
    last: float

    def compute(self) -> float:
        """Seconds of a plain step without messages."""
        return self.batch * self.operations / (PEAK * self.utilisation)


def transformer(
    name: str, parameters: float, layers: int, width: int, classes: int, **rest: Any
) -> Model:
    """6 operations a parameter and token (Kaplan et al. 2020); 16 widths in and out of a block."""
    length, at_the_end = rest["lengths"]
    factors = length * 16 * width * layers, at_the_end * (width + classes)
    operations = 6 * parameters * length
    return Model(name, parameters, operations, factors=factors, last=width * classes, **rest)


MODELS = (
    # He et al. 2016; 4.1e9 multiply-adds forward, times 2, times 3; 11.1e6 activations out of
    # convolutions (Radosavovic et al. 2020), as many in, and typically 14 x 14 positions.
    Model(
        "ResNet-50",
        parameters=25.6e6,
        operations=24.6e9,
        batch=128,
        utilisation=0.15,
        factors=(22.2e6, 2048 + 1000),
        lengths=(196, 1),
        last=2048 * 1000,
    ),
    # Devlin et al. 2019; two classes, from the first token's representation.
    transformer("BERT-base", 110e6, 12, 768, 2, batch=32, utilisation=0.4, lengths=(512, 1)),
    # Radford et al. 2019; the head predicts every token.
    transformer("GPT-2 XL", 1.5e9, 48, 1600, 50257, batch=8, utilisation=0.4, lengths=(1024,) * 2),
)


def seconds(message: Message, gpus: int, network: Network) -> float:
    """Of one collective, by the quickest of NCCL's algorithms and protocols that the model has."""
    nodes = max(1, gpus // GPUS_PER_NODE)
    wires = network.within if nodes == 1 else min(network.within, network.between)
    if message.collective == "all_reduce":
        steps, between, sent = 2 * (gpus - 1), 2 * nodes, 2 * message.bytes * (gpus - 1) / gpus
    else:  # everybody receives what all the others have
        steps, between, sent = gpus - 1, nodes - 1, message.bytes * (gpus - 1)
    between = between if nodes > 1 else 0
    times = []
    for (algorithm, protocol), (near, far) in LATENCIES.items():
        latency = (steps - between) * near + between * far
        if algorithm == "tree":
            if message.collective != "all_reduce":
                continue  # NCCL gathers in rings
            latency = 2 * ((min(gpus, GPUS_PER_NODE) - 1) * near + math.log2(nodes) * far)
        times.append(latency + sent / (EFFICIENCY * CARRIED[protocol] * wires))
    return min(times)


def step(way: str, model: Model, gpus: int, network: Network) -> float:
    """Seconds of a step.

    "DDP" hides its messages behind the backward pass, two thirds of its computation. "global" and
    "local" are as they are built: gradients reach the reducer in one burst, at the end. In
    "overlapped", which is not built, both sums over the parameters are hidden behind all that
    follows the forward pass. "IRWO" sends the factors of all layers, "IRWO, last layer" those of
    the last (`score_parameters="last"`), and every process makes the whole B x B matrix.
    """
    plain = model.compute()
    parts = _messages(way, model)
    *first, update = [seconds(message, gpus, network) for message in parts]
    if way == "DDP":
        return plain / 3 + max(2 * plain / 3, update)
    work = WEIGHING * plain
    if way == "overlapped":
        losses, direction, scores = first
        return plain / 3 + losses + scores + max(work - plain / 3, direction + update)
    if way.startswith("IRWO"):
        work += _gram(model, gpus, way != "IRWO") / (PEAK * model.utilisation)
    return work + sum(first) + update


def _messages(way: str, model: Model) -> list[Message]:
    sent = {"overlapped": "global", "IRWO, last layer": "IRWO"}.get(way, way)
    factors = model.factors[way == "IRWO, last layer"]
    return messages(sent, int(model.parameters), model.batch, [int(factors)])


def _gram(model: Model, gpus: int, last: bool) -> float:
    """Operations for G G^T: by factors, T x T products a pair and layer, or by rows of G."""
    pairs = (model.batch * gpus) ** 2
    rows = model.last if last else model.parameters
    return 2 * pairs * min(model.lengths[last] * model.factors[last], rows)


def rows(network: Network) -> list[dict[str, Any]]:
    """The table: milliseconds of DDP's step, and everything else in units of it."""
    table = []
    for model, gpus in itertools.product(MODELS, GPUS):
        ddp = step("DDP", model, gpus, network)
        sent = sum(m.bytes for m in _messages("global", model) if "reduce" in m.collective)
        row: dict[str, Any] = {"model": model.name, "GPUs": gpus}
        row["computing, ms"] = f"{1e3 * model.compute():.0f}"
        row["DDP, ms"] = f"{1e3 * ddp:.0f}"
        row["IRW sends, GB"] = f"{2 * (gpus - 1) / gpus * sent / 1e9:.2f}"
        for way in ("global", "overlapped", "local", "IRWO, last layer", "IRWO"):
            ratio = step(way, model, gpus, network) / ddp
            row[way] = f"{ratio:.2f}" if ratio < 100 else "> 100"
        table.append(row)
    return table


def draw() -> None:
    """Each model's step over DDP's, by the number of GPUs."""
    gpus = [2**n for n in range(3, 11)]
    fast, slow = NETWORKS
    lines = [("global", fast, "-"), ("overlapped", fast, "--"), ("local", fast, ":")]
    lines += [("global", slow, "-."), ("overlapped", slow, (0, (1, 3)))]
    with report.figure("distributed_scaling.svg", 1, 3, (9.5, 3.2), sharey=True) as (axes,):
        for axis, model in zip(axes, MODELS, strict=True):
            for way, network, style in lines:
                ddp = [step("DDP", model, n, network) for n in gpus]
                ratios = [step(way, model, n, network) / d for n, d in zip(gpus, ddp, strict=True)]
                where = "NDR" if network is fast else "100 Gb/s"
                axis.plot(gpus, ratios, linestyle=style, label=f"{way}, {where}")
            axis.set(xscale="log", xlabel="GPUs", title=model.name, ylim=(0.9, 2.9))
            report.ticks(axis, GPUS)
        axes[0].set_ylabel("step, over DDP's")


def main(given: list[str]) -> None:
    fast = report.options(__doc__, given).fast
    report.save("distributed_traffic", traffic.table(), fast)
    for network, name in zip(NETWORKS, ("", "_ethernet"), strict=True):
        report.save(f"distributed_scaling{name}", rows(network), fast, network=network.name)
    if not fast:
        draw()
