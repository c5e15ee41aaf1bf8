"""Compact recommenders: who knows which ratings, the objective, the study, and networks in use."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dam_recommender_members as members_of
from experiments import dam_recommender_report
from experiments import dam_recommender_study as study
from experiments import dam_recommender_use as use
from experiments.cli import UserError
from experiments.configs import dam_recommender as configs
from experiments.dam_recommender_checks import check_config
from experiments.dam_recommender_published import published
from ntt_sparse.data import ratings, subgraphs
from ntt_sparse.data.ratings import Ratings
from ntt_sparse.gates.dam import Dam
from ntt_sparse.models.igmc import adjacent_rating_penalty

ROOT = Path(__file__).parents[2]
SMALL = {"model.widths": (5, 4), "model.bases": 2, "model.code": 6}


def get_config(name="made,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(SMALL | fields)
    return config


def pairs_of(known):
    return set(zip(known.users.tolist(), known.items.tolist(), strict=True))


@pytest.fixture(scope="module")
def started():
    """The networks of both kinds at their start, each seed with ratings of its own."""
    config = get_config("made,validated,smoke", dam_coefficients=(0.1, 2.0))
    optimizer = members_of.make_optimizer(config, 12)
    return config, {
        gate: members_of.start_members(config, gate, 5, optimizer) for gate in ("none", "dam")
    }


def sharing(members):
    """The same networks, which all know the same ratings."""
    part = jnp.zeros_like(members.context.part)
    return members._replace(context=members.context._replace(part=part))


def test_members_differ_by_seed_alone(started):
    config, members = started
    plain, gated = members["none"], members["dam"]
    names = [members_of.member_names(members_of.runs_of(config, gate)) for gate in members]
    assert names == [
        ["none-s1", "none-s2"], ["dam-c0.1-s1", "dam-c0.1-s2", "dam-c2.0-s1", "dam-c2.0-s2"]
    ]  # fmt: skip
    np.testing.assert_allclose(gated.context.coefficient, [0.1, 0.1, 2.0, 2.0])
    np.testing.assert_array_equal(plain.context.coefficient, [0, 0])
    np.testing.assert_array_equal(gated.context.part, [0, 1, 0, 1])
    np.testing.assert_array_equal(gated.params["gate"]["beta"], np.ones(4))
    for name, layer in plain.params.items():
        for leaf, values in layer.items():
            np.testing.assert_array_equal(values, gated.params[name][leaf][:2])
            np.testing.assert_array_equal(values, gated.params[name][leaf][2:])
            assert not np.allclose(values[0], values[1])
    np.testing.assert_array_equal(*map(jax.random.key_data, (plain.key, gated.key[:2])))


def test_the_rate_falls_after_epochs():
    config = get_config("flixster", **{"training.learning_rate": 0.1, "training.decay_epochs": 2})
    with config.unlocked():
        config.training.epochs = 5
    optimizer = members_of.make_optimizer(config, 3)
    params = jnp.ones(())
    state, moves = optimizer.init(params), []
    for _ in range(15):
        # The first moments of Adam: of gradients that are all equal every step is one rate long.
        update, state = optimizer.update(jnp.ones(()), state, params)
        moves.append(-float(update))
    np.testing.assert_allclose(moves, [0.1] * 6 + [0.01] * 6 + [0.001] * 3, rtol=1e-4)


def test_every_seed_holds_out_ratings_of_its_own():
    """They are in no subgraph, of whichever set."""
    config = get_config("made,validated,smoke")
    data = ratings.make()
    sets = members_of.make_sets(config, data)
    n, m = 633, 158
    assert sets.train.values.shape == (n, 2) and sets.validation.values.shape == (m, 2)
    held = []
    for part, seed in enumerate(config.seeds):
        order = np.random.RandomState(seed).permutation(n + m)
        known = ratings.take(data.train, np.sort(order[m:]))
        graph = subgraphs.index(known, 60, 50, sets.levels)
        for name, chosen in (
            ("train", known), ("validation", ratings.take(data.train, order[:m])),
            ("test", data.test),
        ):  # fmt: skip
            examples, count = getattr(sets, name), len(chosen.values)
            np.testing.assert_array_equal(examples.values[:, part], chosen.values)
            expected = subgraphs.extract(graph, chosen.users, chosen.items)
            for field in ("users", "items", "edge_counts"):
                found = getattr(examples.subgraphs, field)[part * count : (part + 1) * count]
                np.testing.assert_array_equal(found, getattr(expected, field))
        held.append(pairs_of(ratings.take(data.train, order[:m])))
        assert not held[-1] & pairs_of(known)
    assert held[0] != held[1]


def test_a_batch_is_of_the_ratings_of_a_member(started):
    config, members = started
    sets = members_of.make_sets(config, ratings.make())
    sizes = members_of.batch_sizes(config, members["none"], sets.train, 20)
    data, indices = jax.tree.map(jnp.asarray, (sets.train, np.arange(3, 53)))
    pick = jax.jit(functools.partial(members_of.pick, sizes))
    for part in (0, 1):
        member = jax.tree.map(lambda leaf, i=part: leaf[i], members["none"])
        graphs, values = pick(member, data, indices)
        np.testing.assert_array_equal(values, sets.train.values[3:53, part])
        counts = sets.train.subgraphs.users[part * 633 + np.arange(3, 53)]
        assert int(np.sum(graphs.labels == 2)) == counts.sum()


def test_batches_of_all_steps_fit(started):
    """The largest of the orders that training will go through, and no larger than need be."""
    config = get_config("made", **{"training.batch_size": 40})
    sets, members = members_of.make_sets(config, ratings.make()), sharing(started[1]["none"])
    sizes = members_of.batch_sizes(config, members, sets.train, 5 * 19)
    found = sets.train.subgraphs
    nodes = found.users + found.items + 2
    largest = [0, 0]

    @jax.jit
    def order(key, epoch):
        # The stream of the data order is 0, see `ntt_sparse.training.step`.
        key = jax.random.fold_in(jax.random.fold_in(key, 0), epoch)
        return jax.random.permutation(key, len(nodes))

    for key in members.key:
        for epoch in range(5):
            for batch in np.asarray(order(key, epoch))[: 19 * 40].reshape(19, 40):
                sums = nodes[batch].sum(), found.edge_counts[batch].sum()
                largest = list(map(max, largest, sums))
    assert largest[0] <= sizes.nodes <= 9 / 8 * largest[0] + 8
    assert largest[1] <= sizes.edges <= 9 / 8 * largest[1] + 8


@pytest.mark.parametrize("gate", ["none", "dam"])
def test_the_objective(started, gate):
    """Mean squared error of what the network says, plus its two penalties."""
    still = {"model.edge_dropout": 0.0, "model.dropout": 0.0}
    config = get_config(**still, **{"training.adjacent": 0.5})
    sets, members = members_of.make_sets(config, ratings.make()), sharing(started[1][gate])
    member = jax.tree.map(lambda leaf: leaf[1], members)
    sizes = members_of.batch_sizes(config, members, sets.train, 15)
    data = jax.tree.map(jnp.asarray, sets.train)
    module = members_of.network(config, gate, 5)
    terms = study.training_terms(config, gate, 5)

    @jax.jit
    def measure(member):
        batch = members_of.pick(sizes, member, data, jnp.arange(50))
        inputs = study.TermInputs(
            member.params, member.masks, member.context, batch, jax.random.key(0)
        )
        found = module.apply({"params": member.params}, *batch[0])
        return {name: term(inputs)[0] for name, term in terms.items()}, found

    contributions, found = measure(member)
    error = np.mean((np.asarray(found, float) - sets.train.values[:50, 0]) ** 2)
    np.testing.assert_allclose(contributions["error"], error, rtol=1e-5)
    np.testing.assert_allclose(
        contributions["adjacent"], 0.5 * adjacent_rating_penalty(member.params), rtol=1e-5
    )
    # The offset starts at 1.
    assert set(contributions) == {"error", "adjacent"} | ({"gate"} if gate == "dam" else set())
    if gate == "dam":
        np.testing.assert_allclose(contributions["gate"], 0.1, rtol=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was stopped between two parts of the training, and then went on."""
    config = get_config("made,validated,smoke", gates="dam")
    workdir = tmp_path_factory.mktemp("recommender") / "w"
    parts = []

    def stopping(*arguments, **options):
        parts.append(arguments[2])
        if len(parts) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    fit = study.fit_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "fit_stage", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.run(config, workdir)
    assert parts == ["dam-8", "dam-20"]
    assert not (workdir / "summary.json").exists()
    # Other data in the same folder are refused before they leave their levels there.
    assert not (workdir / "levels.json").exists()
    return config, workdir, study.run(config, workdir)


@pytest.mark.slow
def test_a_study_cut_into_parts_is_the_same_training(finished, tmp_path):
    """In one part, and without an interruption: the same networks to the last bit."""
    config, workdir, _ = finished
    whole = config.copy_and_resolve_references()
    with whole.unlocked():
        whole.ensemble = ()
    study.run(whole, tmp_path / "w")
    for name in ("dam-c0.1-s1", "dam-c0.1-s2"):
        files = [w / "networks" / f"{name}.safetensors" for w in (workdir, tmp_path / "w")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_report_follows_from_the_records(finished, tmp_path):
    """Those of the study, beside others as networks with dropout would leave them."""
    config, workdir, alone = finished
    assert json.loads((workdir / "summary.json").read_text()) == alone
    for name in ("dam-8.jsonl", "dam-20.jsonl", "test_dam.json"):
        text = (workdir / name).read_text()
        (tmp_path / name).write_text(text)
        (tmp_path / name.replace("dam", "none")).write_text(text.replace("dam-", "none-"))
    others = {"rmse": [1.5, 1.25], "ensemble_rmse": [1.125, 1.0]}
    (tmp_path / "test_none.json").write_text(json.dumps(others))
    both = config.copy_and_resolve_references()
    with both.unlocked():
        both.gates = "none,dam"
    summary = dam_recommender_report.write(both, tmp_path, (8, 20), 1.25)
    plain, gated = summary["networks"]
    assert (plain["gate"], gated["gate"]) == ("none", "dam")
    assert {name: gated[name] for name in alone["networks"][0]} == alone["networks"][0]
    report = (tmp_path / "report.md").read_text()
    assert "20 steps of 50 ratings, 20% of the training ratings held out" in report
    assert "networks at steps 8, 20" in report and "has an error of 1.2500" in report
    last = json.loads((workdir / "dam-20.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20 and gated["seeds"] == [1, 2]
    assert gated["dimension"]["values"] == last["dimension"] == [6, 6]
    assert gated["validation_rmse"]["values"] == last["validation_rmse"]
    errors = json.loads((workdir / "test_dam.json").read_text())
    assert errors["rmse"] != errors["ensemble_rmse"]
    for name, values in errors.items():
        assert gated[name]["values"] == values and plain[name]["values"] == others[name]
        for row in (values, others[name]):
            assert f"{np.mean(row):.4f} ± {np.std(row, ddof=1):.4f}" in report
        differences = np.subtract(values, others[name])
        np.testing.assert_allclose(gated[f"{name}_difference"]["mean"], differences.mean())
        assert f"{differences.mean():+.4f} [" in report
    for name in ("dimension_none", "dimension_dam", "error_against_dimension"):
        for suffix in ("png", "pdf"):
            assert (tmp_path / "figures" / f"{name}.{suffix}").stat().st_size > 1000


def test_the_mean_rating_is_a_baseline(finished):
    _, _, summary = finished
    data = ratings.make()
    error = np.sqrt(np.mean((data.test.values - data.train.values.mean()) ** 2))
    np.testing.assert_allclose(summary["mean_rmse"], error, rtol=1e-5)


def known_to(config, seed):
    """What the networks of a seed learned from."""
    data = ratings.make()
    order = np.random.RandomState(seed).permutation(len(data.train.values))
    return data, ratings.take(data.train, np.sort(order[158:]))


def test_networks_in_use_give_the_errors_of_the_study(finished):
    """From files, for the test pairs, by what a seed knows; also when cut."""
    config, workdir, summary = finished
    for index, seed in enumerate(config.seeds):
        data, known = known_to(config, seed)
        loaded = use.load(workdir, f"dam-c0.1-s{seed}")
        found = use.predict(
            loaded, known, data.test.users, data.test.items, num_users=60, num_items=50
        )
        error = np.sqrt(np.mean((found.astype(float) - data.test.values) ** 2))
        np.testing.assert_allclose(
            error, summary["networks"][0]["rmse"]["values"][index], rtol=1e-5
        )
    # With some gates closed, the smaller network says the same in other batches.
    params = {**loaded.params, "gate": {"beta": jnp.asarray(-2.0)}}
    closed = loaded._replace(params=params)
    opened = int(np.sum(np.asarray(Dam().values(params["gate"], 6)) > 0))
    small = use.cut(closed)
    assert small.module.code == opened == 4
    whole, few = (
        use.predict(
            one,
            known,
            data.test.users,
            data.test.items,
            num_users=60,
            num_items=50,
            batch_size=size,
        )
        for one, size in ((closed, 50), (small, 96))
    )
    np.testing.assert_allclose(few, whole, rtol=1e-4)
    assert np.std(whole) > 0


def test_networks_rate_for_users_they_never_saw(finished):
    """By their ratings: a new user with those of an old one is rated as that one."""
    config, workdir, _ = finished
    _, known = known_to(config, 1)
    loaded = use.load(workdir, "dam-c0.1-s1")
    old = int(np.bincount(known.users).argmax())
    # The old user is forgotten, the new one takes the last place.
    users = np.where(known.users == old, 60, known.users).astype(np.int32)
    renamed = Ratings(users, known.items, known.values)
    items = np.arange(50)
    before, after = (
        use.predict(loaded, some, np.full(50, user), items, num_users=61, num_items=50)
        for some, user in ((known, old), (renamed, 60))
    )
    np.testing.assert_allclose(after, before, rtol=1e-4)
    assert np.std(before) > 0
    nothing = use.predict(loaded, known, items[:0], items[:0], num_users=60, num_items=50)
    assert nothing.shape == (0,)
    with pytest.raises(ValueError, match="user 61 is out of range"):
        use.predict(loaded, known, np.array([61]), np.array([0]), num_users=61, num_items=50)
    with pytest.raises(ValueError, match="batch_size=0 pairs at a time"):
        use.predict(loaded, known, items, items, num_users=61, num_items=50, batch_size=0)
    with pytest.raises(FileNotFoundError):
        use.load(workdir, "dam-c9-s1")


def test_published_settings():
    """Table 1, Table 3 and the published code."""
    for name, coefficient in (("flixster", 0.1), ("douban", 0.1), ("yahoo_music", 50.0)):
        config = configs.get_config(name)
        training, model = config.training, config.model
        assert (training.epochs, training.batch_size, training.learning_rate) == (100, 50, 1e-3)
        assert (training.decay_epochs, training.decay, training.adjacent) == (50, 0.1, 1e-3)
        assert (tuple(model.widths), model.bases, model.code) == ((32,) * 4, 4, 128)
        assert (model.dropout, model.edge_dropout, config.initial) == (0.5, 0.2, 1.0)
        assert tuple(config.dam_coefficients) == (coefficient,) and len(config.seeds) == 5
        assert config.data.validation_fraction == 0 and tuple(config.ensemble) == (30, 20, 10)
    assert published("douban", "dam") == (0.7183, 0.0004, 17)
    assert published("made", "dam") is None
    for name in configs._CONFIGS:
        check_config(configs.get_config(name))
    assert configs.get_config("flixster,validated").data.validation_fraction == 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gates": "none,l1"}, "config.gates is 'none,l1'"),
        ({"data.name": "netflix"}, "config.data.name is 'netflix'"),
        ({"data.validation_fraction": 1.0}, "config.data.validation_fraction is 1.0"),
        ({"data.validation_fraction": 0.0001}, "holds out none of 791 ratings"),
        ({"data.most": 0}, "config.data.most is 0"),
        ({"dam_coefficients": (math.nan,)}, "config.dam_coefficients holds nan"),
        ({"seeds": ()}, "config.seeds"),
        ({"initial": -5.0}, "config.initial is -5.0: initial is -5.0, which closes all 6"),
        ({"model.widths": ()}, "config.model.widths is ()"),
        ({"model.code": 1}, "config.model.code is 1"),
        ({"model.edge_dropout": 1.0}, "config.model.edge_dropout is 1.0"),
        ({"training.batch_size": 792}, "is 792, there are 791 training ratings"),
        ({"training.learning_rate": math.nan}, "config.training.learning_rate is nan"),
        ({"ensemble": (2,)}, "config.ensemble is (2,), expected different numbers of epochs"),
        ({"ensemble": (1, 1)}, "config.ensemble is (1, 1)"),
        ({"data.name": "douban"}, "say in which folder they are"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_any_work(tmp_path, fields, message):
    with pytest.raises(UserError) as raised:
        study.run(get_config(**fields), tmp_path / "w")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_ratings_from_a_folder(tmp_path):
    """In the format of Monti et al., from the file to the largest batch; damage is one line."""
    made = ratings.make()
    path = tmp_path / "flixster" / "training_test_dataset.mat"
    path.parent.mkdir()
    matrices = {name: np.zeros((60, 50)) for name in ("M", "Otraining", "Otest")}
    for part, mask in ((made.train, "Otraining"), (made.test, "Otest")):
        matrices["M"][part.users, part.items] = part.values
        matrices[mask][part.users, part.items] = 1
    with h5py.File(path, "w") as file:
        for name, matrix in matrices.items():
            file[name] = matrix.T
    config = get_config("flixster,smoke")
    setup, expected = study.prepare(config, str(tmp_path)), study.prepare(get_config(), None)
    for one, other in zip(*map(jax.tree.leaves, (setup.sets, expected.sets)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert setup.stops == (5, 20) and setup.per_epoch == 15
    # Without held-out ratings all networks know the same.
    assert setup.sets.validation is None and setup.sets.train.values.shape == (791, 1)
    path.write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="cannot be read as ratings of Monti"):
        study.run(config, tmp_path / "w", data_dir=str(tmp_path))


def test_help_explains_itself():
    result = subprocess.run(
        [sys.executable, "-m", "experiments.dam_recommender", "--help"],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert "how many numbers describe a pair" in result.stdout and "yahoo_music" in result.stdout
