"""Graphs, by messages along their edges.

A batch is one graph of many parts; the last input says which part a node is in.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Batch, Entry, squared

NODES, FEATURES = 12, 16


def graphs(size: int) -> Batch:
    """Node features (B N, F), edges (2, E), the graph of each node (B N,)."""
    nodes = torch.randn(size * NODES, FEATURES)
    edges = torch.randint(NODES, (2, size, 3 * NODES)) + NODES * torch.arange(size)[:, None]
    index = torch.arange(size).repeat_interleave(NODES)
    return (nodes, edges.flatten(1), index), torch.randint(3, (size,))


def pooled(nodes: Tensor, index: Tensor) -> Tensor:
    """Mean over the nodes of each graph."""
    size = len(nodes) // NODES
    return nodes.new_zeros(size, nodes.shape[1]).index_add(0, index, nodes) / NODES


class GCNLayer(nn.Module):
    """Messages, scaled by the degrees, added where their edges end."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = x.new_ones(len(x)).index_add(0, target, x.new_ones(len(target)))
        scale = (degree[source] * degree[target]).rsqrt()
        x = self.linear(x)
        around = torch.zeros_like(x).index_add(0, target, x[source] * scale[:, None])
        return x / degree[:, None] + around + self.bias


class GINLayer(nn.Module):
    """A sum over the neighbours, and an MLP with BatchNorm over all nodes of the batch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))
        first, last = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)
        self.mlp = nn.Sequential(first, nn.BatchNorm1d(outputs), nn.ReLU(), last)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        index = target[:, None].expand(-1, x.shape[1])
        around = torch.zeros_like(x).scatter_add(0, index, x[source])
        return self.mlp((1 + self.own) * x + around)


class GATLayer(nn.Module):
    """Attention over the edges that end in a node, by learned vectors."""

    def __init__(self, inputs: int, outputs: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.linear = heads, nn.Linear(inputs, outputs, bias=False)
        self.sending, self.receiving = (
            nn.Parameter(torch.randn(heads, outputs // heads) * 0.1) for _ in range(2)
        )
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        x = self.linear(x).view(len(x), self.heads, -1)
        sent, received = (x * self.sending).sum(-1), (x * self.receiving).sum(-1)
        weight = F.leaky_relu(sent[source] + received[target], 0.2).exp()
        total = torch.zeros_like(sent).index_add(0, target, weight) + 1e-9
        messages = x[source] * (weight / total[target])[..., None]
        return torch.zeros_like(x).index_add(0, target, messages).flatten(1) + self.bias


class MessageLayer(nn.Module):
    """GraphSAGE: own features beside the mean of the neighbours'."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.around = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        count = x.new_zeros(len(x)).index_add(0, target, x.new_ones(len(target))).clamp(min=1)
        around = torch.zeros_like(x).index_add(0, target, x[source]) / count[:, None]
        return self.own(x) + self.around(around)


class GraphNet(nn.Module):
    """Layers of one kind, a mean over each graph, a class."""

    def __init__(self, layer: type[nn.Module], width: int = 64, depth: int = 3) -> None:
        super().__init__()
        widths = [FEATURES, *[width] * depth]
        self.layers = nn.ModuleList([layer(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(width, 3)

    def forward(self, nodes: Tensor, edges: Tensor, index: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = F.relu(layer(nodes, edges))
        return self.head(pooled(nodes, index))


class SchNet(nn.Module):
    """Filters made from distances, multiplied to the messages; a number for each molecule."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.atoms = nn.Embedding(10, width)
        self.filters = nn.ModuleList(
            nn.Sequential(nn.Linear(16, width), nn.Softplus(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.updates = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, 1)
        self.register_buffer("centers", torch.linspace(0, 4, 16))

    def forward(self, places: Tensor, atoms: Tensor, edges: Tensor, index: Tensor) -> Tensor:
        source, target = edges
        distance = (places[source] - places[target]).square().sum(1, keepdim=True).add(1e-3).sqrt()
        basis = (-2 * (distance - self.centers).square()).exp()
        x = self.atoms(atoms)
        for make, update in zip(self.filters, self.updates, strict=True):
            messages = x[source] * make(basis)
            x = x + F.softplus(update(torch.zeros_like(x).index_add(0, target, messages)))
        return pooled(self.head(x), index)


def molecules(size: int) -> Batch:
    (nodes, edges, index), _ = graphs(size)
    places, atoms = nodes[:, :3].contiguous(), torch.randint(10, (len(nodes),))
    return (places, atoms, edges, index), torch.randn(size, 1)


ENTRIES = [
    Entry("GCN, index_add", "graphs", 32, lambda: GraphNet(GCNLayer), graphs),
    Entry("GIN, scatter, BatchNorm", "graphs", 32, lambda: GraphNet(GINLayer), graphs),
    Entry("GAT", "graphs", 32, lambda: GraphNet(GATLayer), graphs),
    Entry("GraphSAGE", "graphs", 64, lambda: GraphNet(MessageLayer, 128), graphs),
    Entry("SchNet", "graphs", 32, SchNet, molecules, squared),
]
