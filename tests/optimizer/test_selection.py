"""Which parameters make the scores."""

import pytest
import torch
from torch import nn

from irw_optim.optimizer.irw_optimizer import select_parameters


class Tied(nn.Module):
    """Its head has the embedding's weight, as language models do, and nothing else."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    "chosen",
    [["head"], ["embedding"], "last", ["head.weight"], lambda name, _: name.startswith("head")],
    ids=["module", "owner", "last", "name", "predicate"],
)
def test_a_tied_parameter_is_chosen_by_any_of_its_names(chosen):
    model = Tied()
    assert select_parameters(model, chosen) == {model.embedding.weight}


def test_frozen_parameters_make_no_scores():
    model = Tied()
    model.body.weight.requires_grad_(False)
    assert select_parameters(model, ["body"]) == {model.body.bias}
    assert select_parameters(model, None) == {model.embedding.weight, model.body.bias}
    model.embedding.weight.requires_grad_(False)
    assert select_parameters(model, "last") == {model.body.bias}


def test_names_are_whole_names():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    assert select_parameters(model, ["1"]) == set(model[1].parameters())
    with pytest.raises(ValueError, match="names '11', which the model does not have"):
        select_parameters(model, ["11"])


def test_a_string_is_a_rule_and_no_list_of_letters():
    with pytest.raises(TypeError, match="score_parameters='body': expected None, 'last', a list"):
        select_parameters(Tied(), "body")
    with pytest.raises(ValueError, match="chooses no trainable parameter"):
        select_parameters(Tied(), [])


def test_a_predicate_sees_name_and_parameter():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    matrices = select_parameters(model, lambda _, parameter: parameter.ndim == 2)
    assert matrices == {model[0].weight, model[1].weight}
    assert all(isinstance(p, torch.Tensor) for p in matrices)
