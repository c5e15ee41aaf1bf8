"""The real sets, where they are prepared: golden numbers of MNIST and CIFAR-10."""

import numpy as np
import pytest

from ntt_sparse.data import images, tfds_source


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("real_cache")


@pytest.fixture
def load(real_cache, monkeypatch):
    """`images.load`, or a skip where the set is absent; each set is decoded once."""
    monkeypatch.setenv("NTT_SPARSE_CACHE", str(real_cache))

    def load(name, **options):
        try:
            tfds_source.find(name)
        except FileNotFoundError as error:
            pytest.skip(f"{error}")
        return images.load(name, **options)

    return load


def test_mnist(load):
    data = load("mnist", validation_fraction=0.002)
    # The published run of Neural Tangent Transfer trains on 59,880 images.
    assert data.train.x.shape == (59_880, 28, 28, 1) and data.train.x.dtype == np.float32
    assert len(data.validation.x) == 120 and len(data.test.x) == 10_000
    assert data.num_classes == 10 and data.input_shape == (28, 28, 1)
    # The well-known 0.1307 and 0.3081 in units of 0..255.
    np.testing.assert_allclose(data.mean, [33.31842145], rtol=1e-9)
    np.testing.assert_allclose(data.std, [78.56748998], rtol=1e-9)
    np.testing.assert_allclose(data.train.x.min(), -0.4240738, rtol=1e-5)
    np.testing.assert_allclose(data.train.x.max(), 2.8215435, rtol=1e-5)
    # TensorFlow Datasets shuffles once while it prepares: not the 7, 2, 1 of the first files.
    assert data.test.y[:10].tolist() == [2, 0, 4, 8, 7, 6, 0, 6, 3, 1]


def test_mnist_stages_share_inputs(load):
    transfer = load("mnist", validation_fraction=0.002)
    supervised = load("mnist", validation_fraction=0.1)
    assert len(supervised.train.x) == 54_000
    np.testing.assert_array_equal(transfer.validation.x, supervised.validation.x[:120])
    np.testing.assert_array_equal(transfer.validation.y, supervised.validation.y[:120])


def test_mnist_zeros_and_ones(load):
    data = load("mnist", validation_fraction=0.0)
    assert data.train.y[:10].tolist() == [4, 1, 0, 7, 8, 1, 2, 7, 1, 6]
    classes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(data.train.y).tolist() == classes
    binary = images.subset(data.train, (0, 1), 250)
    assert binary.x.shape == (500, 28, 28, 1)
    assert np.bincount(binary.y).tolist() == [250, 250]
    # The first zero and the first one of the set are there.
    for label, index in ((0, 2), (1, 1)):
        place = np.flatnonzero((binary.x == data.train.x[index]).all((1, 2, 3)))
        assert len(place) == 1 and binary.y[place[0]] == label


@pytest.mark.slow
def test_cifar10(load):
    data = load("cifar10")
    assert data.train.x.shape == (45_000, 32, 32, 3)
    assert len(data.validation.x) == 5_000 and len(data.test.x) == 10_000
    assert data.num_classes == 10
    assert np.bincount(data.test.y).tolist() == [1000] * 10
    # The well-known statistics; a copy may have been through JPEG once.
    np.testing.assert_allclose(data.mean, [125.307, 122.950, 113.865], atol=0.1)
    np.testing.assert_allclose(data.std, [62.993, 62.089, 66.705], atol=0.5)
    x = np.concatenate([data.train.x, data.validation.x])
    np.testing.assert_allclose(x.mean((0, 1, 2), dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((0, 1, 2), dtype=np.float64), 1, atol=1e-6)
