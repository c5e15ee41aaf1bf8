"""The study of dynamic tokens, on a transformer of two blocks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tokens_members as members
from experiments import tokens_study as study
from experiments.cli import UserError
from experiments.configs import tokens as configs
from ntt_sparse import models
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.training.export import load_network


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Of patches of 4 x 4, so that an image is four tokens."""
    module = VisionTransformer(10, patch=4, width=12, depth=2, heads=3)
    monkeypatch.setattr(models, "create", lambda name, num_outputs: module)
    return module


def get_config(**fields):
    config = configs.get_config("digits,smoke")
    with config.unlocked():
        config.update_from_flattened_dict({"model.places": (1,), "keep": (0.75,), **fields})
    return config


def test_a_study(tmp_path, monkeypatch, tiny):
    """Variants start from the whole networks of their kind; rows are of the last records."""
    started, ended, real = {}, {}, study.fit_stage

    def fit_stage(config, workdir, stage, names, population, *args, **kwargs):
        started[stage] = names, population
        ended[stage] = real(config, workdir, stage, names, population, *args, **kwargs)
        return ended[stage]

    monkeypatch.setattr(study, "fit_stage", fit_stage)
    config = get_config(**{"dynamic.fixed": 1.0})
    summary = study.run(config, tmp_path)
    assert [*started] == ["pretrain", "keep_0.75", "keep_0.75_cka"]
    whole = ended["pretrain"]
    np.testing.assert_allclose(whole.context, [0, 0, 1e-2, 1e-2])
    for first, stage in ((0, "keep_0.75"), (2, "keep_0.75_cka")):
        _, begun = started[stage]
        teachers = jax.tree.map(lambda leaf, i=first: leaf[i : i + 2], whole.params)
        jax.tree.map(np.testing.assert_array_equal, begun.params["vit"], teachers)
        jax.tree.map(np.testing.assert_array_equal, begun.context, teachers)
        # The transformer stays for the whole run here, predictors do not.
        jax.tree.map(np.testing.assert_array_equal, ended[stage].params["vit"], teachers)
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), ended[stage].params, begun.params)
        assert moved["predictor_0"]["Dense_0"]["kernel"]
    rows = [(row["keep"], row["cka"]) for row in summary["networks"]]
    assert rows == [(None, False), (None, True), (0.75, False), (0.75, True)]
    last = json.loads((tmp_path / "keep_0.75_cka.jsonl").read_text().splitlines()[-1])
    accuracy = last["test/accuracy"]
    np.testing.assert_allclose(summary["networks"][3]["test_accuracy"]["values"], accuracy)
    assert summary["networks"][2]["multiply_adds"] < summary["networks"][0]["multiply_adds"]
    # What is written is what was trained, and can be used.
    params, _ = load_network(tmp_path / "networks" / "keep_0.75-s1.npz")
    expected = jax.tree.map(lambda leaf: leaf[0], ended["keep_0.75"].params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    module = members.dynamic(config, tiny, members.Variant(0.75, False))
    x = jnp.zeros((2, 8, 8, 1))
    assert jax.eval_shape(module.apply, {"params": params}, x).shape == (2, 10)
    assert "| 0.75 | yes |" in (tmp_path / "report.md").read_text()


def test_what_decays():
    """Without a gradient: matrices alone, as in DeiT."""
    params = {name: jnp.ones((1, 2, 3)) for name in ("cls", "position", "kernel")}
    params["bias"] = jnp.ones(3)
    settings = get_config(**{"pretrain.warmup": 0.0, "pretrain.weight_decay": 0.5}).pretrain
    optimizer = members.whole_optimizer(settings, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert {name for name, leaf in updates.items() if np.any(leaf)} == {"kernel"}
    np.testing.assert_allclose(updates["kernel"], -0.5 * 1e-3, rtol=1e-5)


def test_what_moves(tiny):
    """Predictors at once, blocks after the fixed part and slower, positions never."""
    fields = {"dynamic.fixed": 0.5, "dynamic.weight_decay": 0.0, "dynamic.backbone": 0.01}
    settings = get_config(**fields).dynamic
    settings.warmup = 0.0
    module = members.dynamic(get_config(), tiny, members.Variant(0.75, False))
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    optimizer = members.dynamic_optimizer(settings, 10)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), updates

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=10)[1]

    updates = run(params)
    assert not np.any(updates["vit"]["position"]) and not np.any(updates["vit"]["cls"])
    block = np.asarray(updates["vit"]["block_0"]["fc1"]["kernel"])[:, 0, 0]
    predictor = np.asarray(updates["predictor_0"]["Dense_0"]["kernel"])[:, 0, 0]
    assert not np.any(block[:5]) and np.all(block[5:] < 0)
    # Adam moves by the rate, which falls as a cosine.
    rates = 1e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(10) / 10))
    np.testing.assert_allclose(predictor, -rates, rtol=1e-4)
    np.testing.assert_allclose(block[5:], 0.01 * predictor[5:], rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": (0.0,)}, "config.keep holds 0.0"),
        ({"keep": (0.1,)}, r"keep=0\.1 leaves \(0,\) of 4 patches"),
        ({"model.places": (1.5,)}, r"config.model.places is \(1\.5,\), expected integers"),
        ({"model.places": (1, 2)}, r"places are \(1, 2\), expected blocks from 1 to 1"),
        ({"redundancy.reduce": "max"}, "reduce is 'max'"),
        ({"cka_sr.samples": 2}, "config.cka_sr.samples is 2"),
        ({"dynamic.batch_size": 4000}, "config.dynamic.batch_size is 4000"),
        ({"losses.ratio": -1.0}, "config.losses.ratio is -1.0"),
    ],
)
def test_bad_settings(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        study.run(get_config(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_network(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected a vision transformer"):
        members.transformer(get_config(**{"model.name": "lenet5"}), 10)


@pytest.mark.parametrize("name", configs._CONFIGS)
def test_every_config_is_valid(name, monkeypatch):
    monkeypatch.undo()
    study.check_config(configs.get_config(name))
    study.check_config(configs.get_config(f"{name},smoke"))
