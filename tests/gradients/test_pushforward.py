"""Changes that are pushed forwards, operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
from push_functions import FUNCTIONS
from push_layers import LAYERS
from push_linalg import COMPLEX, LINALG
from push_losses import LOSSES
from push_sequences import ATTENTION, SEQUENCES
from pushes import Case, assert_case, names_in, numbers, unless_torch_lacks_it

from irw_optim.gradients.forward import _tangents
from irw_optim.gradients.mixing_rules import RULES

CASES = [*FUNCTIONS, *LINALG, *COMPLEX, *LAYERS, *LOSSES, *SEQUENCES]

_ELSEWHERE = """
ConvolutionOverrideable CudnnBatchNorm FusedRmsNorm LiftFresh Linear MiopenBatchNorm MkldnnLinear
ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
ScaledDotProductFusedAttentionOverrideable ThnnFusedGruCell ThnnFusedLstmCell
"""
"""On other devices, in other versions, or under the names of what they are made of."""


_ON_THE_HOST = {
    "group plain": "the pretended device has no GroupNorm of channels that stand last",
    "attention of tokens": "the pretended device attends in four dimensions",
    "attention with a learnt bias": "a device's fused attention has no derivative for a mask",
}


def marked(case: Case) -> Any:
    """Left out where a device has no such thing."""
    reason = _ON_THE_HOST.get(case.name)
    return case if reason is None else pytest.param(case, marks=pytest.mark.cpu(reason))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", [*map(marked, CASES)], ids=lambda case: case.name)
def test_equals_rows_of_autograd(case: Case, checkpointed: bool) -> None:
    with unless_torch_lacks_it():
        assert_case(case, checkpointed=checkpointed)


@pytest.mark.parametrize("case", [*map(marked, ATTENTION)], ids=lambda case: case.name)
def test_attention_in_blocks_of_samples(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tangents, "_AT_ONCE", {"cpu": 1})
    with unless_torch_lacks_it():
        assert_case(case, checkpointed=False)


@pytest.mark.cpu("a device has other names for some")
def test_every_operation_of_the_table_is_tested() -> None:
    tested = set[str]()
    for case in CASES:
        with unless_torch_lacks_it():
            tested |= names_in(numbers(case.function(*case.arguments())))
    assert set(RULES) - tested - set(_ELSEWHERE.split()) == set()
