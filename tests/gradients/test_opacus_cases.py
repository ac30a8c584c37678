"""The layer cases of Opacus' own test-suite, run against our products.

Opacus' tests draw layers and inputs with hypothesis and hand them to ``run_test``; here the same
draws are compared with a loop of plain autograd, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import products
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

usual = settings.get_current_profile_name()
settings.register_profile("few", settings.get_profile(usual), max_examples=12)
settings.load_profile("few")  # a test takes the settings at hand when its module is imported
from opacus.tests.grad_samples import (  # noqa: E402
    conv1d_test,
    conv2d_test,
    conv3d_test,
    dp_multihead_attention_test,
    dp_rnn_test,
    embedding_bag_test,
    embedding_test,
    group_norm_test,
    instance_norm1d_test,
    instance_norm2d_test,
    instance_norm3d_test,
    layer_norm_test,
    linear_test,
    rms_norm_test,
    sequence_bias_test,
)

settings.load_profile(usual)


class AgainstTheLoop:
    """Takes the place of Opacus' comparison of its grad_sample with microbatches."""

    covered = True
    """Whether ``engine="ghost"`` takes the layer where the batch comes first."""

    def run_test(
        self, x: Any, module: nn.Module, batch_first: bool = True, **tolerances: Any
    ) -> None:
        model, run = module.double(), runner(x, batch_first)
        with torch.no_grad():
            losses = run(model)
        if not losses.any():
            return  # nobody in the batch, or nothing of them: see test_layers.py
        engine = "ghost" if self.covered and batch_first else "auto"
        products.check(model, run, engine, 1e-10, len(losses))


def runner(x: Any, batch_first: bool) -> Callable[[nn.Module], Tensor]:
    """A function from the module to the losses (B,) of the input that Opacus drew."""
    inputs = x if isinstance(x, tuple) and not isinstance(x, PackedSequence) else (x,)

    def losses_of(model: nn.Module) -> Tensor:
        output = model(*(to_double(input) for input in inputs))
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, batch_first=batch_first)
        output = output if batch_first else output.transpose(0, 1)
        pattern = torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()
        return (output + pattern).square().flatten(1).sum(1)

    return losses_of


def to_double(input: Any) -> Any:
    floating = input.data if isinstance(input, PackedSequence) else input
    return input.to(torch.float64) if floating.is_floating_point() else input


class TestConv1d(AgainstTheLoop, conv1d_test.Conv1d_test):
    pass


class TestConv2d(AgainstTheLoop, conv2d_test.Conv2d_test):
    test_unfold2d = None  # of Opacus' own functions
    test_asymetric_dilation_and_kernel_size = None


class TestConv3d(AgainstTheLoop, conv3d_test.Conv3d_test):
    pass


class TestDPMultiheadAttention(AgainstTheLoop, dp_multihead_attention_test.MultiHeadAttention_test):
    covered = False


class TestDPRNN(AgainstTheLoop, dp_rnn_test.RNN_test):
    covered = False


class TestEmbedding(AgainstTheLoop, embedding_test.Embedding_test):
    pass


@pytest.mark.cpu("its bags' indices are made on the host")
class TestEmbeddingBag(AgainstTheLoop, embedding_bag_test.Embedding_bag_test):
    pass


class TestGroupNorm(AgainstTheLoop, group_norm_test.GroupNorm_test):
    pass


class TestInstanceNorm1d(AgainstTheLoop, instance_norm1d_test.InstanceNorm1d_test):
    pass


class TestInstanceNorm2d(AgainstTheLoop, instance_norm2d_test.InstanceNorm2d_test):
    pass


class TestInstanceNorm3d(AgainstTheLoop, instance_norm3d_test.InstanceNorm3d_test):
    pass


class TestLayerNorm(AgainstTheLoop, layer_norm_test.LayerNorm_test):
    pass


class TestLinear(AgainstTheLoop, linear_test.Linear_test):
    pass


class TestRMSNorm(AgainstTheLoop, rms_norm_test.RMSNorm_test):
    pass


class TestSequenceBias(AgainstTheLoop, sequence_bias_test.SequenceBias_test):
    covered = False
