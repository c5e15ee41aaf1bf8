r"""Settings of sparse training: how networks get their masks, with and without regularisers.

A name picks the settings. `,smoke` shrinks them, to see that all parts work:

    python -m experiments.sparse_training --config=experiments/configs/sparse_training.py:mnist_snip

====================  ================================================================
digits_synflow        the default: 8x8 digits inside scikit-learn, no download
mnist_METHOD          LeNet-300-100, densities 0.2 to 0.002
lenet5_caffe_METHOD   the same for LeNet-5 as shipped with Caffe
cifar10_METHOD        ResNet-20, densities 0.1, 0.05, 0.02
NETWORK_METHOD        the same for resnet32, resnet56, resnet18, resnet50 and vgg19
vit_METHOD            a small vision transformer on CIFAR-10, densities 0.2, 0.05
digits_vit_METHOD     the same on 8x8 digits, no download
text_METHOD           a small transformer of texts (GPT-2's blocks), byte by byte, on the help that
                      comes with Python; a file is --config.data.name=FILE.txt
imagenet_METHOD       ResNet-18 at density 0.05, for a folder: --config.data.name=FOLDER
imagenet50_METHOD     ResNet-50
pretraining_NETWORK   ResNet-18 or -50 whole (density 1) on CIFAR-100, imagenet_resnet18 or
                      imagenet_resnet50 on ImageNet: Table 4
====================  ================================================================

Methods are `random` (ERK), `magnitude`, `snip`, `logit_snip`, `grasp`, `synflow`, `set`, `rigl`,
`gradual`, `lth`, `dlth`, `dlth_iterative` and `l0`. Settings of training are the same for all, so
that only masks differ: on CIFAR-10 those of random sparse training (Liu et al., ICLR 2022), on
MNIST and the digits Adam, of transformers AdamW. Lottery tickets prune a fifth of what is left at
each level, so they take as many times as long as there are levels: with the dense one 11 down to a
density of 0.1, 28 to 0.002; `dlth` takes 90,000 steps more on CIFAR-10, as published, and on MNIST
a tenth of that. Its densities are ERK's, where the published code leaves the first and the last
layer whole. `l0` trains whole networks with gates for as long as sparse ones, once for all
densities. Transformers have no `synflow`: layer normalisation takes out what flows.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

BASE: dict[str, Any] = {
    "name": "",
    # How masks are made: random; magnitude, snip, logit_snip, grasp, synflow (scores at
    # initialisation); set, rigl (random at first, connections replaced in training); gradual
    # (magnitude, while the network is trained); lth (lottery tickets: train, prune by magnitude,
    # go back and train again, from density to density); dlth (random masks; before they are
    # applied, a growing decay draws to zero what they prune); l0 (a gate for each weight is trained
    # first).
    "method": "random",
    # Rounds in which scores are pruned; 100 for SynFlow.
    "rounds": 1,
    # Connections that set and rigl replace: every so many steps until a fraction of the run, a
    # fraction of each layer that falls by a cosine.
    "growth": {"every": 100, "end": 0.75, "fraction": 0.3},
    # Between which fractions of the run gradual pruning happens, every so many steps.
    "gradual": {"every": 100, "start": 0.1, "end": 0.6},
    # Lottery tickets: the part of what is left that each level prunes, about (0: as much as leads
    # to the next density that is asked for); the fraction of the run to which training goes back,
    # and what does: weights (with batch statistics and the schedule), learning_rate (the schedule
    # alone), or, as a control, everything to weights drawn anew (random).
    "lth": {"prune": 0.2, "rewind": 0.0, "restore": "weights"},
    # Of dlth: the decay grows by the increment in every so many steps until it is above the
    # ceiling, to the power (x, x^2, x^3), and then stays for as many steps as it is held; all
    # that in each cycle, which prunes the same part of what is left.
    "transform": {
        "cycles": 1,
        "every": 5,
        "increment": 1e-4,
        "ceiling": 1.0,
        "power": 1,
        "hold": 40_000,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
    # Of l0: the penalty is the coefficient times the expected number of weights by that of training
    # examples; the chance of a weight to be dropped at the start; the learning rate of gates.
    "l0": {
        "coefficient": 0.1,
        "drop": 0.3,
        "learning_rate": 1e-3,
        "epochs": 5,
        "batch_size": 64,
        # As those of supervised.
        "record_every": 0,
        "max_steps": 0,
    },
    # What is compared with no regulariser: cka_sr, aug_cka_sr, each also with _debiased, cca_sr,
    # aug_cca_sr; and l1 and l2, sums of absolute weights and of their squares. Each is run with
    # every coefficient, density and seed.
    "regularisers": "cka_sr,aug_cka_sr",
    "coefficients": (1e-4,),
    "density": (0.05,),
    "seeds": (1, 2, 3, 4, 5),
    # Where the densities of layers come from: erk, uniform, global (weights compete across the
    # network), snip (those of a SNIP mask) or grasp (of a GraSP mask), the last two with masks
    # that are random themselves.
    "layer_densities": "erk",
    # Examples that score masks: the first of the training split, or so many of each class.
    "score_batch_size": 128,
    "score_per_class": 0,
    # Feature maps, stage by stage: patterns of module paths, several joined by commas. Two
    # stages on the command line: --config.stages="('Conv_0,Conv_1','Dense_0,Dense_1')". The
    # map of a layer is its output, of a Dense or Conv before the ReLU, of a residual block after.
    "stages": (),
    # Examples of a batch that are compared (0: all), and one batch in how many.
    "samples": 8,
    "every": 5,
    # Held-out images on which similarity is measured.
    "probe": 256,
    # Held-out and test images whose accuracy is measured (0: all).
    "evaluated": 0,
    # A name as of `ntt_sparse.data.images.load`, or of `ntt_sparse.data.text.load`; the size of
    # images is of those in folders, the length of texts is that of their windows.
    "data": {"name": "mnist", "split_seed": 9, "augment": False, "size": 224, "length": 64},
    "model": {
        "name": "lenet_300_100",
        "padding": "",
        "norm": "",
        "shortcut": "",
        "stem": "",
        "dropout": False,
        # A safetensors file with the names of torchvision's ResNets that every seed starts from.
        "weights": "",
    },
    "supervised": {
        "epochs": 5,
        "batch_size": 64,
        "learning_rate": 1e-3,
        # adam; sgd, with Nesterov momentum; adamw, whose decay is of weights alone and whose rate
        # falls by a cosine.
        "optimizer": "adam",
        "weight_decay": 0.0,
        # Of all networks, whatever they are compared by: the weight of the sum of absolute
        # weights, and the part of the target that all classes share.
        "l1": 0.0,
        "label_smoothing": 0.0,
        # Fractions of the run at which the learning rate is divided by ten, and the fraction over
        # which it rises at first.
        "milestones": (),
        "warmup": 0.0,
        "validation_fraction": 0.1,
        # 0: once an epoch.
        "record_every": 0,
        # 0: epochs decide.
        "max_steps": 0,
    },
    "checkpoint_seconds": 60.0,
}
"""All fields with their defaults."""
RESNET = {
    # The input of each stage and the outputs of its blocks (Eq. 11).
    "stages": tuple(f"stage{i}_block1:input,stage{i}_block?" for i in (1, 2, 3)),
    "regularisers": "cka_sr",
    "data.name": "cifar10",
    "data.augment": True,
    "model.name": "resnet20",
    "model.norm": "batch",
    "model.shortcut": "B",
    "supervised.epochs": 160,
    "supervised.batch_size": 128,
    "supervised.learning_rate": 0.1,
    "supervised.optimizer": "sgd",
    "supervised.weight_decay": 5e-4,
    "supervised.milestones": (0.5, 0.75),
}
"""ResNet-20 on CIFAR-10."""
SMOKE = {
    "seeds": (1, 2),
    "data.size": 32,
    "probe": 16,
    "evaluated": 256,
    "supervised.max_steps": 12,
    "supervised.record_every": 6,
    "supervised.batch_size": 64,
    "growth.every": 3,
    "gradual.every": 3,
    "lth.prune": 0.0,
    "transform.increment": 0.25,
    "transform.hold": 4,
    "l0.max_steps": 6,
    "l0.record_every": 6,
}
"""What shows that all parts work."""

_SMALL_IMAGES: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "resnet32": {"model.name": "resnet32"},
    "resnet56": {"model.name": "resnet56"},
    **{
        name: {
            "model.name": name,
            "model.norm": "",
            "model.shortcut": "",
            "stages": tuple(f"stage{i}_block1:input,stage{i}_block?" for i in (1, 2, 3, 4)),
        }
        for name in ("resnet18", "resnet50")
    },
    # Stages end where pooling halves the images.
    "vgg19": {
        "model.name": "vgg19",
        "model.norm": "",
        "model.shortcut": "",
        "stages": tuple(
            ",".join(f"Conv_{i}" for i in range(first, first + count))
            for first, count in ((0, 2), (2, 2), (4, 4), (8, 4), (12, 4))
        ),
    },
}
"""What differs from ResNet-20, by network."""
_IMAGENET = {
    **RESNET,
    **_SMALL_IMAGES["resnet18"],
    "coefficients": (1e-5,),
    "density": (0.05,),
    # What is held in memory: as floats 6 GB each of validation and test.
    "evaluated": 10_000,
    "data.name": "./imagenet",
    # As published; the networks of a seed share what is read.
    "seeds": (1,),
    "model.stem": "imagenet",
    "supervised.epochs": 100,
    "supervised.batch_size": 768,
    "supervised.learning_rate": 0.4,
    "supervised.label_smoothing": 0.1,
    "supervised.milestones": (0.3, 0.6, 0.9),
    "supervised.warmup": 0.05,
    "supervised.validation_fraction": 0.01,
    "l0.epochs": 100,
    "l0.batch_size": 768,
}
"""ImageNet, after random sparse training, whose last layer is whole; it is not so here, and the
milestones are ours."""
_METHODS: dict[str, dict[str, Any]] = {
    "random": {},
    **{
        method: {"method": method, "layer_densities": "global"}
        for method in ("magnitude", "snip", "logit_snip", "grasp", "gradual", "lth", "l0")
    },
    "synflow": {"method": "synflow", "layer_densities": "global", "rounds": 100},
    "set": {"method": "set"},
    "rigl": {"method": "rigl"},
    "dlth": {"method": "dlth"},
    "dlth_iterative": {
        "method": "dlth",
        "transform.cycles": 5,
        "transform.every": 1,
        "transform.hold": 10_000,
    },
}
_MLP = {"stages": ("Dense_0,Dense_1",), "regularisers": "cka_sr", "coefficients": (1e-2,)}
_CNN = {
    **_MLP,
    "stages": ("Conv_0,Conv_1", "Dense_0,Dense_1"),
    "model.name": "lenet5_caffe",
}
_TRANSFORMER = {
    "stages": ("block_?",),
    "regularisers": "cka_sr",
    "coefficients": (1e-2,),
    "supervised.optimizer": "adamw",
    "supervised.weight_decay": 0.05,
    "supervised.warmup": 0.1,
}
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "vit": {
        "data.name": "cifar10",
        "data.augment": True,
        "model.name": "vit_patch4",
        "supervised.epochs": 200,
        "supervised.batch_size": 128,
        "l0.epochs": 200,
        "l0.batch_size": 128,
    },
    "digits_vit": {
        "data.name": "digits",
        "model.name": "vit_patch2",
        "probe": 128,
        "supervised.epochs": 30,
        "l0.epochs": 30,
    },
    "text": {
        "data.name": "pydoc",
        "model.name": "gpt_micro",
        "supervised.epochs": 10,
        "l0.epochs": 10,
    },
}
"""Small transformers; their blocks are one stage."""
_CONFIGS: dict[str, dict[str, Any]] = {
    "digits_synflow": {
        **_MLP,
        **_METHODS["synflow"],
        "density": (0.1, 0.02),
        "seeds": (1, 2, 3),
        "probe": 128,
        "data.name": "digits",
        "supervised.epochs": 20,
    },
    **{
        f"{network}_{method}": {
            **fields,
            **settings,
            "density": (0.2, 0.05, 0.02, 0.005, 0.002),
            "transform.increment": 1e-3,
            "transform.hold": settings.get("transform.hold", 40_000) // 10,
            # In five epochs 0.1, as published for 200 or more, closes next to nothing.
            "l0.coefficient": 10.0,
            "l0.learning_rate": 1e-2,
        }
        for network, fields in (("mnist", _MLP), ("lenet5_caffe", _CNN))
        for method, settings in _METHODS.items()
    },
    **{
        f"{network}_{method}": {
            **RESNET,
            **fields,
            **settings,
            "density": (0.1, 0.05, 0.02),
            # Of its code, for CIFAR-10.
            "score_per_class": 10 if method == "grasp" else 0,
            "l0.epochs": 160,
            "l0.batch_size": 128,
        }
        for network, fields in _SMALL_IMAGES.items()
        for method, settings in _METHODS.items()
    },
    **{
        f"{network}_{method}": {
            **_TRANSFORMER,
            **fields,
            **settings,
            "density": (0.2, 0.05),
            "transform.increment": 1e-3,
            "transform.hold": settings.get("transform.hold", 40_000) // 10,
        }
        for network, fields in _TRANSFORMERS.items()
        for method, settings in _METHODS.items()
        if method != "synflow"
    },
    **{
        f"{name}_{method}": {**_IMAGENET, "model.name": network, **settings}
        for name, network in (("imagenet", "resnet18"), ("imagenet50", "resnet50"))
        for method, settings in _METHODS.items()
    },
    # Of the paper, the schedule that all its other runs have; it does not say this one.
    **{
        f"pretraining_{network}": {
            **RESNET,
            **_SMALL_IMAGES[network],
            "data.name": "cifar100",
            "density": (1.0,),
        }
        for network in ("resnet18", "resnet50")
    },
    **{
        f"pretraining_imagenet_{network}": {
            **_IMAGENET,
            "model.name": network,
            "density": (1.0,),
        }
        for network in ("resnet18", "resnet50")
    },
}


def get_config(name: str = "digits_synflow") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"mnist_rigl"` or `"cifar10_snip,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, BASE, _CONFIGS, {"smoke": SMOKE})
