"""The scaling model is what it is meant to be."""

import pytest

from benchmarks.cost import local, scaling


def test_a_large_sum_takes_its_bytes_over_the_wires():
    """2 (N - 1) / N vectors through the slowest wire, and next to nothing for latency."""
    fast, slow = scaling.NETWORKS
    vector = scaling.Message("all_reduce", 10**11)
    for gpus, wire in ((8, fast.within), (64, fast.between), (1024, fast.between)):
        expected = 2 * (gpus - 1) / gpus * 4e11 / (0.8 * wire)
        assert scaling.seconds(vector, gpus, fast) == pytest.approx(expected, rel=1e-3)
    assert scaling.seconds(vector, 64, slow) > 30 * scaling.seconds(vector, 64, fast)


def test_a_small_gather_takes_a_ring_of_latencies():
    """1,023 steps, of which 127 go from one node to another."""
    message = scaling.Message("all_gather", 1)
    taken = scaling.seconds(message, 1024, scaling.NETWORKS[0])
    assert taken == pytest.approx(896 * 0.6e-6 + 127 * 2.7e-6, rel=1e-3)


def test_what_hides_messages_is_quicker_and_what_sends_less_too():
    for network in scaling.NETWORKS:
        for model in scaling.MODELS:
            for gpus in scaling.GPUS:
                times = {
                    way: scaling.step(way, model, gpus, network)
                    for way in ("DDP", "local", "overlapped", "global")
                }
                assert times["DDP"] < times["local"] < times["global"]
                assert times["overlapped"] < times["global"]
                assert times["DDP"] > 0.999 * model.compute()


@pytest.mark.slow
def test_two_processes_are_two_passes_in_one():
    assert local.check(steps=3) < 1e-6
