"""The Neural Tangent Transfer study: prepare, transfer, train, report."""

import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from experiments import ntt_report
from experiments.cli import claim_workdir, user_errors
from experiments.ntt_checks import check_config, check_sizes
from experiments.ntt_members import (
    keep_counts,
    log_densities,
    member_names,
    supervised_members,
    supervised_runs,
    transfer_members,
    transfer_runs,
)
from experiments.ntt_stages import (
    make_optimizer,
    refresh_masks,
    supervised_evaluation,
    supervised_terms,
    transfer_evaluation,
    transfer_terms,
)
from experiments.stage import fit_stage
from experiments.study import hold_out, make_plan, member_mode, save_networks
from ntt_sparse import models
from ntt_sparse._types import ApplyFn
from ntt_sparse.data import images
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import processes
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import make_step
from ntt_sparse.training.stopping import EarlyStopping

_logger = logging.getLogger(__name__)


class Setup(NamedTuple):
    """Everything that is known before training starts."""

    apply_fn: ApplyFn
    module: Any
    input_shape: tuple[int, ...]
    transfer: images.ImageData
    supervised: images.ImageData
    transfer_plan: Plan | None
    supervised_plan: Plan


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.ntt.get_config`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: Where prepared TensorFlow Datasets are; by default as TFDS decides.

    Returns:
        The summary, as in `summary.json`; empty on all processes but the first.

    Raises:
        UserError: The config, the data or the work directory does not permit the study;
            nothing was changed.
    """
    with user_errors():
        check_config(config)
        setup = prepare(config, data_dir)
    with claim_workdir(workdir, config.to_dict()) as claimed:
        transferred = None
        if "ntt" in config.methods.split(","):
            transferred = transfer(config, setup, claimed)
        trained = supervise(config, setup, claimed, transferred)
        names = member_names(supervised_runs(config))
        _, gone = ntt_report.gone(config, claimed)
        save_networks(claimed / "networks", names, trained, gone)
        return ntt_report.write(config, claimed) if processes.is_first() else {}


def prepare(config: Any, data_dir: str | None) -> Setup:
    """Loads data and model and plans both stages, before anything is trained or written."""
    whole = images.load(
        config.data.name,
        data_dir=data_dir,
        validation_fraction=0.0,
        seed=config.data.split_seed,
    )
    if config.data.classes:
        whole = _keep_classes(whole, tuple(config.data.classes), config.data.per_class)
    options = {name: config.model[name] for name in ("padding", "norm") if config.model[name]}
    module = models.create(config.model.name, num_outputs=whole.num_classes, **options)
    # Shapes alone: a model that the images do not fit is found out here.
    keep_counts(module, whole.input_shape, supervised_runs(config), "layer")
    data, plans = {}, {}
    for stage in ("transfer", "supervised"):
        if stage == "transfer" and "ntt" not in config.methods.split(","):
            data[stage], plans[stage] = whole, None
            continue
        fraction = config[stage].validation_fraction
        data[stage] = hold_out(whole, fraction, config.data.split_seed)
        n = len(data[stage].train.y)
        plans[stage] = make_plan(config[stage], n, config.checkpoint_seconds)
        members = transfer_runs(config) if stage == "transfer" else supervised_runs(config)
        meshes.auto_mesh(len(members), config[stage].batch_size)
    check_sizes(config, data["transfer"], data["supervised"])
    return Setup(
        apply_fn=models.apply_fn(module),
        module=module,
        input_shape=whole.input_shape,
        transfer=data["transfer"],
        supervised=data["supervised"],
        transfer_plan=plans["transfer"],
        supervised_plan=plans["supervised"],
    )


def _keep_classes(
    data: images.ImageData, classes: tuple[int, ...], per_class: int
) -> images.ImageData:
    test_counts = [int(np.sum(data.test.y == label)) for label in classes]
    return data._replace(
        train=images.subset(data.train, classes, per_class),
        test=images.subset(data.test, classes, min(per_class, *test_counts)),
        num_classes=len(classes),
    )


def transfer(config: Any, setup: Setup, workdir: Path) -> Member:
    """The label-free stage: one student per density and seed. Returns its members."""
    runs = transfer_runs(config)
    inputs = setup.transfer.train.x
    members = transfer_members(config, setup.module, setup.input_shape, inputs, runs)
    log_densities(runs, members)
    plan = cast(Plan, setup.transfer_plan)
    step_fn = make_step(
        transfer_terms(config, setup.apply_fn),
        make_optimizer(config.transfer),
        after_update=refresh_masks(config.transfer.refresh_every, plan.total_steps),
    )
    # Kernels are large: on a CPU, members one after another bound the memory and cost no time.
    mode = "loop" if jax.default_backend() == "cpu" else "vmap"
    held_out = setup.transfer.validation.x[: config.transfer.batch_size]
    evaluate = transfer_evaluation(config, setup.apply_fn)
    return fit_stage(
        config, workdir, "transfer", member_names(runs), members, step_fn, plan, inputs, evaluate,
        (held_out,), mode, batch_size=config.transfer.batch_size, freeze=True,
    )  # fmt: skip


def supervise(config: Any, setup: Setup, workdir: Path, transferred: Member | None) -> Member:
    """The supervised stage: every method, density and seed in one program."""
    runs = supervised_runs(config)
    data = setup.supervised
    members = supervised_members(
        config, setup.module, setup.input_shape, data.train, runs, transferred
    )
    log_densities(runs, members)
    step_fn = make_step(supervised_terms(config, setup.apply_fn), make_optimizer(config.supervised))
    mode = member_mode(members)
    evaluate = supervised_evaluation(config, setup.apply_fn)
    evaluation_data = (
        tuple(data.validation),
        tuple(data.test),
        data.train.x[: config.probe],
    )
    return fit_stage(
        config, workdir, "supervised", member_names(runs), members, step_fn, setup.supervised_plan,
        tuple(data.train), evaluate, evaluation_data, mode, batch_size=config.supervised.batch_size,
        stopping=early_stopping(config.supervised.patience), freeze=True,
    )  # fmt: skip


def early_stopping(patience: int) -> EarlyStopping | None:
    """All networks train until none has a better validation accuracy; 0 for never."""
    if not patience:
        return None
    return EarlyStopping("validation/accuracy", patience, higher=True, alone=False)
