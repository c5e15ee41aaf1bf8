"""The flags of `benchmarks/ntk.py`: faults in one line, before any work."""

import jax
import pytest

from ntt_sparse import models


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("ntk")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, expected 1 or more"),
        (["--batch", "1"], "--batch is 1, expected 2 or more"),
        (["--density", "0.1", "3"], r"--density is 3\.0, expected fractions in \(0, 1\]"),
        (["--peers", "jvp,jacrv"], r"--peers has 'jacrv', expected parts of: vmap\(jacrev\), "),
    ],
)
def test_faults(benchmark, monkeypatch, flags, message):
    monkeypatch.setattr(benchmark, "report", lambda *_: pytest.fail("work was done"))
    with pytest.raises(SystemExit, match=f"^{message}") as error:
        benchmark.main(flags)
    assert "\n" not in str(error.value)


def test_parts_of_names(benchmark):
    assert benchmark.parse([]).peers == benchmark.ntk_peers.names()
    assert benchmark.parse(["--peers", "jacrev"]).peers[0] == "vmap(jacrev)"
    assert "jacobian(jvp(vjp))" not in benchmark.parse(["--peers", "jacrev"]).peers


def test_help_names_the_peers_and_defaults(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 64)" in text
    assert "peers installed: vmap(jacrev), jacobian(jvp(vjp))" in text


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        ("lenet_300_100", [(1, 784, 300), (1, 300, 100), (1, 100, 10)]),
        ("lenet5_caffe", [(576, 25, 20), (64, 500, 50), (1, 800, 500), (1, 500, 10)]),
    ],
)
def test_layers_whose_operations_are_counted(benchmark, network, sizes):
    """Positions, inputs and outputs, by hand."""
    module, (shape, _) = models.create(network), benchmark._SHAPES[network]
    params = models.init(module, jax.random.key(0), shape)
    layers = benchmark.ntk_operations.layers(module, params, shape)
    assert [tuple(layer[:3]) for layer in layers] == sizes
    assert [layer.convolution for layer in layers] == [positions > 1 for positions, _, _ in sizes]
