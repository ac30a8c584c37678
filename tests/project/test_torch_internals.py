"""What is used of torch that it does not promise: a version that drops one fails here, by name."""

from __future__ import annotations

import sys
from operator import attrgetter

import pytest
import reference
import torch
from agreement import agree
from torch import nn

from irw_optim import IRWOptimizer, torch_internals

USED = {
    "autograd.Variable._execution_engine.run_backward": "run_backward",
    "_C._will_engine_execute_node": "will_run",
    "_C._autograd._get_current_graph_task_keep_graph": "graph_is_kept",
    "autograd.Variable._execution_engine.queue_callback": "_engine",
    "_C._functorch.peek_interpreter_stack": "transform",
    "_disable_dynamo": "_disable",
    "_C._dynamo.eval_frame.set_eval_frame": "_set_compiler",
    "overrides._get_current_function_mode_stack": "_modes",
    "overrides._pop_mode_temporarily": "_without_mode",
}
OF_THE_COMPILER = {"_disable", "_set_compiler", "_without_mode"}
"""Looked for once; without them less is compiled."""
IN_THEIR_PLACE = {
    "run_backward": torch_internals._by_autograd,
    "will_run": lambda node: True,
    "graph_is_kept": lambda: True,
    "transform": lambda: None,
}


@pytest.mark.parametrize("name", USED)
def test_it_is_there(name):
    assert callable(attrgetter(name)(torch))


def test_many_tensors_at_once():
    tensors = [torch.tensor([3.0, 4.0]), torch.empty(0), torch.tensor(2j, dtype=torch.complex64)]
    assert [*map(float, torch_internals.lengths(tensors))] == pytest.approx([5, 0, 2])
    wide = [torch.ones(4, dtype=torch.float64), torch.ones(9)]
    assert [*map(float, torch_internals.lengths(wide))] == pytest.approx([2, 3])
    copied = torch_internals.copies(tensors)
    assert all(map(torch.equal, copied, tensors))
    assert [c.data_ptr() for c in copied[:1]] != [t.data_ptr() for t in tensors[:1]]


def test_the_cpu_gives_products_of_bfloat16_as_they_are():
    assert not torch_internals.sums_wide("cpu")


@pytest.mark.parametrize("name", ["_input_metadata", "_saved_mat1", "_saved_beta"])
def test_a_node_tells_what_it_saved(name):
    output = nn.Linear(2, 3)(torch.randn(4, 2, requires_grad=True))
    assert hasattr(output.grad_fn, name)


@pytest.mark.parametrize("name", sorted(set(USED.values()) - OF_THE_COMPILER))
def test_without_it_a_step_is_as_exact(name, monkeypatch):
    for module in [m for n, m in sys.modules.items() if n.startswith("irw_optim.")]:
        if name in vars(module):
            monkeypatch.setattr(module, name, IN_THEIR_PLACE.get(name))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.4, model=model)
    for _ in range(3):
        x = torch.randn(6, 4).double()
        truth = reference.step(model(x).square().sum(1), model.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(model(x).square().sum(1))
        agree(optimizer, model, truth)
        optimizer.step()
