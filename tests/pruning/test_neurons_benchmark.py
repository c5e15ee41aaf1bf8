"""`benchmarks/neurons.py` on a few neurons: its references agree with each other and with ours."""

import numpy as np
import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("neurons")


def test_orders_are_those_of_both_references(benchmark, capsys):
    benchmark.main(
        "--widths 20 --through 20 --seeds 2 --sample 2 --rounds 1 --large 30".split()
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "p = 20: all 20 neurons as in long doubles for 2 of 2 seeds" in printed
    assert "p = 20: 4 of 4 as by rank-one brute force: True" in printed
    assert "the first as by the paper's: True" in printed
    assert "p = 30: 6 neurons in" in printed
    # Of 20, 19, 18 and 17 candidates.
    assert f"{20:>12}{4:>12}{74:>12}" in printed


def test_every_brute_force_is_the_same_similarity(benchmark):
    x = benchmark.activations(12, 0)
    update = benchmark._rank_one(x)
    for make in (benchmark._brute_force_jax, benchmark._brute_force()[0]):
        whole = make(x)
        for index in range(12):
            assert whole(index) == pytest.approx(update(index), abs=2e-6)
    assert np.sum(np.ptp(benchmark.activations(32, 0), 0) == 0) == 2
    values = [update(index) for index in range(12)]
    assert benchmark.rank_one_order(x, 1) == [int(np.argmax(values))]
    assert benchmark.long_double_order(x, 12)[:5] == benchmark.rank_one_order(x, 5)
