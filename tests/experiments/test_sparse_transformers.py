"""Sparse training of transformers, of images and of texts, with CKA-SR between their blocks."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_training_problems import networks

from experiments import sparse_training_checks as checks
from experiments import sparse_training_masks as methods
from experiments import sparse_training_stages as stages
from experiments import sparse_training_study as study
from experiments.configs import sparse_training as configs
from experiments.optimizers import adamw
from ntt_sparse.models.text import TextTransformer
from ntt_sparse.pruning import masks
from ntt_sparse.training.step import TermInputs

TEXT = "to be or not to be, that is the question. " * 60


def get_config(tmp_path, name="text_random", **fields):
    path = tmp_path / "hamlet.txt"
    path.write_text(TEXT)
    config = configs.get_config(f"{name},smoke")
    small = {"data.length": 8, "supervised.batch_size": 16, "model.name": "gpt_nano"}
    if name.startswith("text"):
        fields = {"data.name": str(path), **small, **fields}
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("name", ["digits_vit_random", "text_grasp", "text_l0", "digits_vit_lth"])
def test_configs_fit_their_data(tmp_path, name):
    config = get_config(tmp_path, name, **{"score_per_class": 0})
    setup = study.prepare(config, None)
    checks.check_sizes(config, setup.module, setup.data, setup.plan)


def two_blocks(patch):
    """One block less."""
    two = functools.partial(TextTransformer, width=48, depth=2, heads=3)
    patch.setattr(study, "make_model", lambda config, num_outputs: two(num_outputs))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    config = get_config(
        folder, "text_snip", **{
            "supervised.max_steps": 60, "supervised.record_every": 60, "every": 1,
            "density": (0.3,), "supervised.learning_rate": 1e-2, "coefficients": (1.0,),
            "seeds": (1,),
        },
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        two_blocks(patch)
        summary = study.run(config, folder / "w")
    return config, summary, folder / "w"


def test_a_text_is_learnt(trained):
    """A text that repeats itself takes next to no bits, where a guess by frequency takes 3.5."""
    _, summary, workdir = trained
    none, cka_sr = summary["supervised"]
    assert none["regulariser"] == "none"
    counts = np.unique(list(TEXT), return_counts=True)[1] / len(TEXT)
    entropy = -np.sum(counts * np.log2(counts))
    assert none["test_bits_last"]["mean"] < 0.5 * entropy
    last = json.loads((workdir / "supervised.jsonl").read_text().splitlines()[-1])
    bits = [value for row in (none, cka_sr) for value in row["test_bits_last"]["values"]]
    np.testing.assert_allclose(bits, np.asarray(last["test/loss"]) / np.log(2), rtol=1e-6)
    assert none["test_accuracy_last"]["mean"] > 0.5
    # And CKA-SR does what it is for.
    assert cka_sr["similarity/cka"]["mean"] < none["similarity/cka"]["mean"] - 0.05
    report = (workdir / "report.md").read_text()
    assert "Bits of a byte" in report and "hundredths of a bit" in report
    expected = cka_sr["test_bits_last"]["mean"] - none["test_bits_last"]["mean"]
    assert cka_sr["less_baseline_bits"]["mean"] == pytest.approx(expected, abs=1e-6)


def test_only_weights_of_layers_are_pruned(trained):
    _, summary, workdir = trained
    assert all(name.endswith("kernel") for name in summary["layers"])
    # qkv, proj, fc1, fc2 of two blocks, and the head.
    assert len(summary["layers"]) == 4 * 2 + 1
    total = sum(summary["layers"].values())
    for params, kept in networks(workdir).values():
        assert kept["embed"]["embedding"] is None and kept["position"] is None
        assert sum(int(np.sum(leaf)) for leaf in jax.tree.leaves(kept)) == round(0.3 * total)
        for name, mask in masks.named_leaves(kept).items():
            assert np.all(np.asarray(masks.named_leaves(params)[name])[~np.asarray(mask)] == 0)
        assert np.all(np.asarray(params["position"]) != 0)


def test_snip_of_a_text_by_hand(tmp_path, monkeypatch):
    """The absolute product of each weight and the derivative of the mean loss of all bytes."""
    two_blocks(monkeypatch)
    config = get_config(tmp_path, "text_snip", **{"score_batch_size": 6, "density": (0.25,)})
    setup = study.prepare(config, None)
    x, y = (leaf[:6] for leaf in setup.data.train)
    params = jax.jit(setup.module.init)(jax.random.key(5), x)["params"]

    def loss(params):
        logits = setup.module.apply({"params": params}, x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)
        return -jnp.mean(chosen)

    gradients = jax.jit(jax.grad(loss))(params)
    scores = {
        name: np.abs(np.asarray(leaf, float) * np.asarray(masks.named_leaves(gradients)[name]))
        for name, leaf in masks.named_leaves(params).items() if name.endswith("kernel")
    }  # fmt: skip
    flat = np.concatenate([leaf.ravel() for leaf in scores.values()])
    threshold = np.sort(flat)[-round(0.25 * flat.size)]
    made = methods.starting_masks(config, setup.module, x.shape[1:])(
        jax.random.key(0), params, {}, (jnp.asarray(x), jnp.asarray(y))
    )[0.25]
    for name, mask in masks.named_leaves(made).items():
        differ = np.asarray(mask) != (scores[name] >= threshold)
        # Up to rounding of scores about the threshold.
        assert np.all(np.abs(scores[name][differ] / threshold - 1) < 1e-3)
        assert np.mean(differ) < 1e-3


def test_cka_sr_between_blocks(tmp_path):
    """The term is the coefficient times the sum of linear CKA of all pairs of blocks, both ways."""
    config = get_config(tmp_path, "digits_vit_random", **{"samples": 5, "every": 1})
    setup = study.prepare(config, None)
    module, x = setup.module, jnp.asarray(setup.data.train.x[:12])
    variables = module.init(jax.random.key(1), x)
    patterns = stages.all_patterns(config)
    outputs, features = stages.capture(module, patterns, examples=5)(variables, x)
    term = stages.training_terms(config)["similarity"]
    given = TermInputs(
        params=variables["params"], masks=None, batch=(x, None), key=jax.random.key(0), step=0,
        context={"cka_sr": jnp.float32(0.7)}, model_state={}, outputs=(),
    )  # fmt: skip
    value, _ = term(given._replace(outputs=stages.terms.NetworkOutputs(outputs, features)))
    maps, y = [], module.bind(variables).embed(x)
    for block in range(9):
        y = module.bind(variables).block[block](y)
        flat = np.asarray(y[:5], float).reshape(5, -1)
        maps.append(flat - flat.mean(0))
    grams = [a @ a.T for a in maps]
    expected = sum(
        np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(grams) for j, b in enumerate(grams) if i != j
    )  # fmt: skip
    np.testing.assert_allclose(value, 0.7 * expected, rtol=1e-4)


def test_what_decays_and_how_the_rate_goes():
    class Settings:
        warmup, weight_decay = 0.2, 0.5

    optimizer = adamw(Settings, 10, 1e-2)
    params = {
        "block_0": {"fc1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
        "embed": {"embedding": jnp.ones((3, 2))}, "position": jnp.ones((1, 3, 2)),
        "cls": jnp.ones((1, 1, 2)), "norm": {"scale": jnp.ones(2)},
    }  # fmt: skip
    state, rates = optimizer.init(params), []
    for _ in range(10):
        updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
        moved = {name for name, leaf in masks.named_leaves(updates).items() if np.any(leaf != 0)}
        assert moved <= {"block_0/fc1/kernel"}
        rates.append(-float(updates["block_0"]["fc1"]["kernel"][0, 0]) / 0.5)
    cosine = 1e-2 * (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    np.testing.assert_allclose(rates, cosine * [0.5, *[1] * 9], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("text_random", {"model.name": "lenet_300_100"}, "a transformer of texts and a text"),
        ("text_random", {"data.name": "digits"}, "a transformer of texts and a text"),
        ("text_random", {"data.name": "./absent.txt"}, "there is no text"),
        ("text_random", {"data.augment": True}, "texts are as they are"),
        ("text_random", {"data.length": 10**6}, "expected windows of 1000000"),
        ("text_random", {"data.length": 0}, "config.data.length is 0"),
        ("text_grasp", {"score_per_class": 2}, "windows of a text have no class"),
        ("text_random", {"supervised.milestones": (0.5,)}, "its rate falls by a cosine"),
        ("text_random", {"method": "synflow"}, "takes out what flows"),
        ("digits_vit_random", {"method": "synflow"}, "takes out what flows"),
        ("text_random", {"supervised.batch_size": 10**6}, "there are .* examples"),
        ("text_random", {"stages": ("blocks_?",)}, "blocks_"),
    ],
)
def test_what_does_not_go_together(tmp_path, name, fields, message):
    if fields.get("method") == "synflow":
        fields = {**fields, "layer_densities": "global"}
    with pytest.raises(Exception, match=message) as error:
        study.run(get_config(tmp_path, name, **fields), tmp_path / "w")
    assert type(error.value).__name__ == "UserError" and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()
