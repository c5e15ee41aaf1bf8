"""The study of dynamic tokens, on a transformer of two blocks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import tokens_members as members
from experiments import tokens_report as report
from experiments import tokens_study as study
from experiments.cli import UserError
from experiments.configs import tokens as configs
from ntt_sparse import models
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.training.export import load_network
from ntt_sparse.training.step import TermInputs


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


@pytest.mark.parametrize("cka", ["both", pytest.param("no,both", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("unrendered")
def test_a_study(tmp_path, monkeypatch, tiny, cka):
    """Variants start from the whole networks of their kind; rows are of the last records."""
    started, ended, real = {}, {}, study.fit_stage

    def fit_stage(config, workdir, stage, names, population, *args, **kwargs):
        started[stage] = names, population
        ended[stage] = real(config, workdir, stage, names, population, *args, **kwargs)
        return ended[stage]

    monkeypatch.setattr(study, "fit_stage", fit_stage)
    config = get_config(**{"dynamic.fixed": 1.0, "cka": cka})
    summary = study.run(config, tmp_path)
    stages = ["keep_0.75", "keep_0.75_both"][-len(cka.split(",")) :]
    assert [*started] == ["pretrain", *stages]
    whole = ended["pretrain"]
    np.testing.assert_allclose(whole.context, [0, 0, 1e-2, 1e-2][-2 * len(stages) :])
    for first, stage in zip((0, 2), stages, strict=False):
        _, begun = started[stage]
        teachers = jax.tree.map(lambda leaf, i=first: np.asarray(leaf)[i : i + 2], whole.params)
        jax.tree.map(np.testing.assert_array_equal, begun.params["vit"], teachers)
        jax.tree.map(np.testing.assert_array_equal, begun.context, teachers)
        # The transformer stays for the whole run here, predictors do not.
        jax.tree.map(np.testing.assert_array_equal, ended[stage].params["vit"], teachers)
        moved = (each.params["predictor_0"]["Dense_0"]["kernel"] for each in (ended[stage], begun))
        assert np.any(np.not_equal(*moved))
    rows = {(row["keep"], row["cka"]): row for row in summary["networks"]}
    kinds = [(None, "no"), (None, "training"), (0.75, "no"), (0.75, "both")]
    assert [*rows] == (kinds if len(stages) == 2 else kinds[1::2])
    whole_cka, dynamic_cka = rows[kinds[1]], rows[kinds[3]]
    last = json.loads((tmp_path / "keep_0.75_both.jsonl").read_text().splitlines()[-1])
    accuracy = last["test/accuracy"]
    np.testing.assert_allclose(dynamic_cka["test_accuracy"]["values"], accuracy)
    assert dynamic_cka["multiply_adds"] < whole_cka["multiply_adds"]
    # What is written is what was trained, and can be used.
    params, _ = load_network(tmp_path / "networks" / "keep_0.75_both-s1.safetensors")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf)[0], ended["keep_0.75_both"].params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    module = members.dynamic(config, tiny, members.Variant(0.75, "both"))
    x = jnp.zeros((2, 8, 8, 1))
    assert jax.eval_shape(module.apply, {"params": params}, x).shape == (2, 10)
    text = (tmp_path / "report.md").read_text()
    assert "| 0.75 | both |" in text
    # What is published is of another network and other data.
    assert "72.20" not in text and "Mean CKA of different blocks" in text
    less = np.subtract(*(row["test_accuracy"]["values"] for row in (dynamic_cka, whole_cka)))
    np.testing.assert_allclose(dynamic_cka["less_whole"]["mean"], np.mean(less), atol=1e-9)
    assert 0 <= whole_cka["similarity"]["mean"] <= 1
    assert members.dynamic(config, tiny, members.Variant(0.75, "both")).redundancy is not None


def test_variants_start_from_the_whole_networks_of_their_kind():
    config = get_config(cka="no,training,decision,both", seeds=(1, 2, 3))
    assert members.whole_names(config)[2:4] == ["whole-s3", "whole_training-s1"]
    found = {each.cka: members.sources_of(config, each) for each in members.variants(config)}
    plain, with_cka = [0, 1, 2], [3, 4, 5]
    assert found == {"no": plain, "training": with_cka, "decision": plain, "both": with_cka}


def test_published_numbers_are_of_their_network():
    rows = [
        {"keep": keep, "cka": cka, "parameters": 1, "multiply_adds": 1, **values}
        for keep, cka in (
            (None, "no"), (None, "training"), (0.7, "no"), (0.7, "both"), (1.0, "no")
        )
        for values in [
            {name: {"mean": 0.5, "std": None, "values": [0.5]}
             for name in ("test_accuracy", "validation_accuracy", "similarity")}
        ]
    ]  # fmt: skip
    lines = report._markdown(configs.get_config("imagenet"), rows).splitlines()
    cells = [line.split("|")[-2].strip() for line in lines if line.startswith("| ")]
    assert cells == ["published", "---", "72.20", "", "71.11", "71.35", ""]
    lines = report._markdown(configs.get_config("digits"), rows).splitlines()
    assert not any("72.20" in line for line in lines)


def test_what_training_minimises(tiny):
    """All terms by hand, of a teacher that is another network."""
    config = get_config(**{
        "losses.ratio": 3.0, "losses.distillation": 5.0, "losses.tokens": 7.0,
        "dynamic.label_smoothing": 0.0,
    })  # fmt: skip
    module = members.dynamic(config, tiny, members.Variant(0.75, "both"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32)
    y = jnp.asarray([0, 1, 2, 3, 4, 5])
    init = jax.jit(module.init)
    params, teacher = (init(jax.random.key(seed), x)["params"] for seed in (1, 2))
    # So large that student and teacher differ.
    params, teacher = (
        jax.tree.map(lambda leaf: 5 * np.asarray(leaf), tree) for tree in (params, teacher)
    )
    key = jax.random.key(3)

    @jax.jit
    def measure(params, teacher):
        inputs = TermInputs(
            params=params, masks=None, batch=(x, y), key=key, step=0, context=teacher,
            model_state={},
        )  # fmt: skip
        found, _ = study.dynamic_forward(module)(inputs)
        terms = study.dynamic_terms(config, module).items()
        return {name: term(inputs._replace(outputs=found))[0] for name, term in terms}

    @jax.jit
    def separately(params, teacher):
        return (
            module.apply({"params": params}, x, rngs={"tokens": key}, method="sample"),
            tiny.apply({"params": teacher}, x, method="encode"),
            tiny.apply({"params": teacher}, x),
        )

    values = jax.tree.map(float, measure(params, teacher["vit"]))
    sampled, tokens, other = separately(params, teacher["vit"])
    logits, decisions = np.asarray(sampled.logits, float), np.asarray(sampled.decisions)
    other = np.asarray(other, float)
    log_p, log_q = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (logits, other))
    assert 0 < decisions[-1].sum() < decisions[-1].size
    squares = (np.asarray(sampled.features) - np.asarray(tokens)[:, 1:]) ** 2
    expected = {
        "task": -np.mean(log_p[np.arange(6), y]),
        "ratio": 3 * np.mean((decisions[0].mean(1) - 0.75) ** 2),
        "distillation": 5 * np.mean(np.sum(np.exp(log_q) * (log_q - log_p), 1)),
        "tokens": 7 * squares.mean(2)[decisions[-1] > 0].mean(),
    }
    assert expected["distillation"] > 1e-3 and expected["tokens"] > 1e-3
    assert values == pytest.approx(expected, rel=1e-4)


def test_every_whole_transformer_starts_from_the_weights_of_a_file(monkeypatch, tiny):
    given = jax.jit(tiny.init)(jax.random.key(9), jnp.zeros((1, 8, 8, 1)))
    monkeypatch.setattr(members, "load_deit", lambda path, module, shape: given)
    config = get_config(**{"model.weights": "deit.safetensors"})
    optimizer = members.whole_optimizer(config.pretrain, 10)
    started = members.start_whole(config, tiny, (8, 8, 1), optimizer)
    jax.tree.map(
        lambda leaf, one: np.testing.assert_array_equal(leaf, np.stack([one] * 4)),
        started.params,
        given["params"],
    )


@pytest.mark.slow
def test_images_of_a_folder(tmp_path):
    """What is larger than memory streams, whole and with tokens that are dropped."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label in range(2):
            folder = tmp_path / "made" / split / f"n{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (10, 10, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    fields = {
        "data.name": str(tmp_path / "made"), "data.size": 8, "data.augment": True, "seeds": (1,),
        "evaluated": 4,
    }  # fmt: skip
    summary = study.run(get_config(**fields), tmp_path / "run")
    assert len(summary["networks"]) == 4
    with pytest.raises(UserError, match=r"config\.evaluated is 0"):
        study.run(get_config(**{**fields, "evaluated": 0}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_what_decays():
    """Without a gradient: matrices alone, as in DeiT."""
    params = {name: jnp.ones((1, 2, 3)) for name in ("cls", "position", "kernel")}
    params["bias"] = jnp.ones(3)
    settings = get_config(**{"pretrain.warmup": 0.0, "pretrain.weight_decay": 0.5}).pretrain
    optimizer = members.whole_optimizer(settings, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params))()
    assert {name for name, leaf in updates.items() if np.any(leaf)} == {"kernel"}
    np.testing.assert_allclose(updates["kernel"], -0.5 * settings.learning_rate, rtol=1e-5)


def test_what_moves(tiny):
    """Predictors at once, blocks after the fixed part and slower, positions never."""
    fields = {"dynamic.fixed": 0.5, "dynamic.weight_decay": 0.0, "dynamic.backbone": 0.01}
    settings = get_config(**fields).dynamic
    settings.warmup = 0.0
    module = members.dynamic(get_config(), tiny, members.Variant(0.75, "no"))
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
        ({"keep": (0.1,)}, r"config\.keep: keep=0\.1 leaves \(0,\) of 4 patches"),
        ({"model.places": (1.5,)}, r"config.model.places is \(1\.5,\), expected integers"),
        (
            {"model.places": (1, 2)},
            r"config\.model with config\.keep: places are \(1, 2\), expected",
        ),
        ({"cka": "no,no"}, "config.cka is 'no,no'"),
        ({"cka": "always"}, "config.cka is 'always'"),
        ({"redundancy.rows": "images"}, r"config\.redundancy\.rows is 'images'"),
        ({"redundancy.reduce": "max"}, r"config\.redundancy\.reduce is 'max'"),
        ({"redundancy.weight": 1e300}, r"config\.redundancy\.weight is 1e\+300"),
        ({"cka_sr.regulariser": "cca"}, r"config\.cka_sr\.regulariser is 'cca'"),
        ({"model.weights": "absent.safetensors"}, "there is no file"),
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
