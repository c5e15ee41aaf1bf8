r"""Settings of structured pruning with gates (Bu et al. 2021, arXiv:2110.01684, Section 5).

A name picks the settings. `,smoke` shrinks them, to see that all parts work (PreResNet-164
and VGG-19 still take long on a CPU):

    python -m experiments.dam_pruning
    python -m experiments.dam_pruning --config=experiments/configs/dam_pruning.py:table5a,smoke

======================  ===================================================================
digits_lenet5           the default: LeNet-5, 8x8 digits inside scikit-learn, no download
table5a                 Table 5a: LeNet-5 on MNIST, tanh
table5b                 Table 5b: with 5% of noise on gradients
table5c                 Table 5c: sine
mnist_budget            ours: LeNet-5, training stops pruning at targets
figure6_cifar10         Fig. 6 and E4: PreResNet-164, CIFAR-10
figure6_cifar100        Fig. 6: CIFAR-100
table2                  Table 2: five random orders of channels
table6_vgg19            Table 6: VGG-19, CIFAR-10
table6_vgg19_cifar100   Table 6
table6_preresnet20      Table 6: PreResNet-20, CIFAR-100
table6_preresnet56      Table 6: PreResNet-56, CIFAR-100
table6_preresnet110     Table 6: PreResNet-110, CIFAR-10
table6_preresnet110_cifar100  Table 6
table8                  Table 8: PreResNet-164, TinyImageNet, from a .npz file
cifar10_preresnet20     ours: PreResNet-20, CIFAR-10
cifar10_budget          ours: the same with targets
figure6_slimming        Fig. 6: Network Slimming, PreResNet-164, CIFAR-10
figure6_chipnet         Fig. 6: ChipNet, the same network
mnist_dam               ours: LeNet-5 on MNIST, DAM
mnist_l1                L1 gates beside it
mnist_slimming          Network Slimming beside it
mnist_chipnet           ChipNet beside it
mnist_l0                hard-concrete gates (L0) on the same network
cifar10_preresnet20_slimming  Network Slimming beside cifar10_preresnet20
cifar10_preresnet20_chipnet   ChipNet beside it
======================  ===================================================================

What decides how far offsets fall is their weight decay, as much as the data: without a task,
an offset rests at `-coefficient / (layers * weight_decay)`. The published code decays them like
all other parameters, and so do these settings (`--config.training.decay_gates=False` stops it).

What is ours, the same for all coefficients: how LeNet-5 is trained, and its noise, of which the
paper says nothing; of Tables 6 and 8 everything but AdaBelief and the epochs; augmentation, which
continues images by their mirror image where the published code has zeros.

Networks of one program share the memory of the device: split the coefficients of the deep ones.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

_STAGE: dict[str, Any] = {
    "epochs": 0,
    "batch_size": 128,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "milestones": (0.5, 0.75),
    "milestone_factor": 0.1,
    "record_every": 0,
    "max_steps": 0,
}
_BASE: dict[str, Any] = {
    "name": "",
    # The gates: dam, l1, slimming, chipnet or hard_concrete.
    "gate": "dam",
    # Where order numbers start: paper or code.
    "convention": "paper",
    # Of DAM: steepness, range of the order numbers, and the shape of the gate (relu_tanh, linear,
    # piecewise_linear).
    "alpha": 1.0,
    "k": 5.0,
    "shape": "relu_tanh",
    # Offset (dam) or gates (l1) to start from.
    "initial": 1.0,
    # Chance of a hard-concrete gate to be dropped at the start.
    "drop": 0.3,
    # Weights of the penalty (lambda); of hard-concrete gates it is the expected fraction of
    # parameters: the paper's lambda, of which each weight costs one part in so many training
    # examples, times the number of weights, divided by that of examples.
    "coefficients": (0.0, 0.1),
    # Orders in which channels close: 0 is that of the index, others are random orders.
    "orders": (0,),
    "seeds": (1, 2, 3, 4, 5),
    # What a budget counts: channels, parameters, multiply_adds, volume (chipnet: of features), or
    # layers (dam: the channels of each layer); empty for none. The targets are the fractions that
    # are kept.
    "budget": "",
    "targets": (1.0,),
    # Standard deviation of the noise on each gradient, relative to its root mean square.
    "gradient_noise": 0.0,
    "data": {"name": "mnist", "split_seed": 9, "augment": False},
    # Of LeNets: activation (relu, tanh, sine), and how many hidden layers are gated (0: all).
    "model": {"name": "lenet5", "activation": "", "gated": 0},
    "training": {
        "epochs": 30,
        # Epochs before gates move.
        "cold_start": 1.0,
        "batch_size": 128,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "decay_gates": True,
        # Fractions of the run at which the learning rate is multiplied by the factor. The other
        # schedule of the published code halves it at 0.15, 0.3, 0.45, 0.6, 0.75 and 0.9.
        "milestones": (0.5, 0.75),
        "milestone_factor": 0.1,
        "validation_fraction": 0.1,
        # 0: once an epoch.
        "record_every": 0,
        # 0: epochs decide.
        "max_steps": 0,
    },
    # Stages before and after, of the rivals of DAM; without epochs they are left out.
    # Copies: one object in two places is one setting.
    "pretrain": {**_STAGE},
    "finetune": {**_STAGE},
    # Channels of each layer that are kept in any case when channels are cut (slimming, l1).
    "slimming": {"keep": 0},
    # Weights of the losses that hold the budget and make gates crisp; how many epochs of their
    # schedules the stage runs through (0: as many as it has).
    "chipnet": {"budget": 30.0, "crispness": 10.0, "continuation_epochs": 0},
    # Similarity of layers that is penalised in the stage that trains the initial weights (CKA-SR):
    # its coefficients (0: none), patterns of layers by stage, the examples of a batch that are
    # compared (0: all), and one batch in how many.
    "cka_sr": {"coefficients": (0.0,), "stages": (), "samples": 8, "every": 5},
    # Whether every network is made small after training, and written and measured.
    "compact": False,
    # Layer between whose channels similarity is measured (Table 7): what has the gate, such as
    # stage1_block18/Conv_2 (of ChipNet Gate_2, of Network Slimming BatchNorm_2), and on how many
    # held-out images; empty for none.
    "similarity": "",
    "probe": 256,
    # Held-out and test images whose accuracy is measured (0: all).
    "evaluated": 0,
    "checkpoint_seconds": 60.0,
}
# The schedules of ChipNet's code, which the comparison of the paper has for all.
_SLIMMING = {
    "gate": "slimming",
    "budget": "channels",
    "training.cold_start": 0.0,
    "finetune.epochs": 50,
}
_CHIPNET = {
    "gate": "chipnet",
    "budget": "channels",
    "coefficients": (1.0,),
    "training.optimizer": "adamw",
    "training.learning_rate": 1e-3,
    "training.weight_decay": 1e-3,
    "training.decay_gates": False,
    "training.milestones": (),
    "training.cold_start": 0.0,
    "training.batch_size": 32,
}
# The first three layers, as the title of the table has it.
_TABLE5 = {
    "coefficients": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0),
    "model.activation": "tanh",
    "model.gated": 3,
}
# The proportions of the comparison of the paper: 200 epochs, 20 for the gates of ChipNet, and 50
# after cutting.
_LENET_RIVAL = {
    "model.activation": "tanh",
    "model.gated": 3,
    "budget": "parameters",
    "targets": (0.1,),
    "slimming.keep": 1,
    "training.epochs": 8,
    "training.cold_start": 0.8,
    "finetune.epochs": 2,
    "finetune.weight_decay": 1e-4,
    "compact": True,
}
_CIFAR = {
    "coefficients": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75),
    "data.name": "cifar10",
    "data.augment": True,
    "model.name": "preresnet164",
    "training.epochs": 200,
    "training.cold_start": 20.0,
    "training.weight_decay": 1e-3,
    # The 54th after the first: where the first stage ends.
    "similarity": "stage1_block18/Conv_2",
}
_CIFAR100 = {
    **_CIFAR,
    "data.name": "cifar100",
    "coefficients": (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
}
# From another implementation, of which the optimiser and the epochs are said.
_ADABELIEF = {
    **_CIFAR,
    "similarity": "",
    "training.optimizer": "adabelief",
    "training.learning_rate": 1e-3,
    "training.epochs": 160,
}
_TABLE6 = (0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0)
_PRERESNET20 = {**_CIFAR, "model.name": "preresnet20", "similarity": "stage1_block2/Conv_2"}
_FRACTIONS = (0.1, 0.2, 0.4, 0.6)
_RESNET18 = {
    "data.name": "cifar10",
    "data.augment": True,
    "model.name": "resnet18",
    "training.epochs": 160,
    "training.learning_rate": 0.1,
    "training.weight_decay": 5e-4,
    "training.cold_start": 0.0,
    "cka_sr.coefficients": (0.0, 1e-4),
    "cka_sr.stages": tuple(f"stage{i}_block1:input,stage{i}_block?" for i in (1, 2, 3, 4)),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "digits_lenet5": {
        **_TABLE5,
        "coefficients": (0.0, 0.05, 0.5),
        "seeds": (1, 2, 3),
        "data.name": "digits",
        "training.epochs": 30,
    },
    "table5a": _TABLE5,
    "table5b": {**_TABLE5, "gradient_noise": 0.05},
    "table5c": {
        **_TABLE5,
        "coefficients": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        "model.activation": "sine",
    },
    "mnist_budget": {
        **_TABLE5,
        "coefficients": (1.0,),
        "budget": "parameters",
        "targets": (0.5, 0.25, 0.1),
    },
    "figure6_cifar10": _CIFAR,
    "figure6_cifar100": _CIFAR100,
    "figure6_slimming": {
        **_CIFAR,
        **_SLIMMING,
        "coefficients": (1e-5,),
        "targets": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
        "similarity": "stage1_block18/BatchNorm_2",
    },
    "figure6_chipnet": {
        **_CIFAR,
        **_CHIPNET,
        "similarity": "stage1_block18/Gate_2",
        "targets": _FRACTIONS,
        "pretrain.epochs": 200,
        "training.epochs": 20,
        "finetune.epochs": 50,
    },
    "mnist_slimming": {
        **_LENET_RIVAL,
        "gate": "slimming",
        "coefficients": (1e-2,),
        "training.cold_start": 0.0,
    },
    "mnist_chipnet": {
        **_LENET_RIVAL,
        **_CHIPNET,
        "budget": "parameters",
        "chipnet.continuation_epochs": 20,
        "pretrain.epochs": 8,
        "pretrain.weight_decay": 1e-4,
        "training.epochs": 4,
        "training.learning_rate": 1e-2,
    },
    "mnist_l1": {**_LENET_RIVAL, "gate": "l1", "coefficients": (1.0,)},
    # The optimiser of their code.
    "mnist_l0": {
        **_TABLE5,
        "gate": "hard_concrete",
        "coefficients": (0.03, 0.1, 0.3),
        "training.optimizer": "adam",
        "training.learning_rate": 1e-3,
        "training.weight_decay": 0.0,
        "training.decay_gates": False,
        "training.cold_start": 0.0,
        "training.epochs": 20,
        "compact": True,
    },
    "mnist_dam": {**_LENET_RIVAL, "coefficients": (0.3,), "finetune.epochs": 0},
    "cifar10_preresnet20_slimming": {
        **_PRERESNET20,
        **_SLIMMING,
        "similarity": "",
        "coefficients": (1e-5,),
        "targets": (0.6, 0.4),
    },
    "cifar10_preresnet20_chipnet": {
        **_PRERESNET20,
        **_CHIPNET,
        "similarity": "",
        "targets": (0.6, 0.4),
        "pretrain.epochs": 200,
        "training.epochs": 20,
        "finetune.epochs": 50,
    },
    # Cut after training with and without CKA-SR (the coefficient is that of sparse training).
    "mnist_slimming_cka_sr": {
        **_LENET_RIVAL,
        "gate": "slimming",
        "coefficients": (1e-2,),
        "training.cold_start": 0.0,
        "targets": (0.1, 0.05),
        "cka_sr.coefficients": (0.0, 1e-2),
        "cka_sr.stages": ("Conv_0,Conv_1", "Dense_0,Dense_1"),
        "compact": False,
    },
    "cifar10_resnet18_slimming": {
        **_RESNET18,
        **_SLIMMING,
        "coefficients": (1e-5,),
        "targets": (0.6, 0.4),
    },
    # lambda = 0.001 for each weight of 11 million, for 50,000 examples.
    "cifar10_resnet18_l0": {
        **_RESNET18,
        "gate": "hard_concrete",
        "coefficients": (0.0, 0.2),
        "training.decay_gates": False,
    },
    "table2": {**_CIFAR, "coefficients": (0.4,), "orders": (1, 2, 3, 4, 5), "seeds": (1,)},
    "table6_vgg19": {**_ADABELIEF, "model.name": "vgg19", "coefficients": (0.1, 0.5)},
    "table6_vgg19_cifar100": {
        **_ADABELIEF,
        "data.name": "cifar100",
        "model.name": "vgg19",
        "coefficients": (0.1, 0.5),
    },
    "table6_preresnet20": {
        **_ADABELIEF,
        "data.name": "cifar100",
        "model.name": "preresnet20",
        "coefficients": _TABLE6,
    },
    "table6_preresnet56": {
        **_ADABELIEF,
        "data.name": "cifar100",
        "model.name": "preresnet56",
        "coefficients": _TABLE6,
    },
    "table6_preresnet110": {
        **_ADABELIEF,
        "model.name": "preresnet110",
        "coefficients": _TABLE6,
    },
    "table6_preresnet110_cifar100": {
        **_ADABELIEF,
        "data.name": "cifar100",
        "model.name": "preresnet110",
        "coefficients": _TABLE6,
    },
    # With the epochs of CIFAR-100 (Appendix E.4).
    "table8": {
        **_ADABELIEF,
        "training.epochs": 200,
        "coefficients": (0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0),
        "data.name": "tiny_imagenet.npz",
    },
    "cifar10_preresnet20": _PRERESNET20,
    "cifar10_budget": {
        **_PRERESNET20,
        "coefficients": (1.0,),
        "budget": "parameters",
        # One channel of each layer is a fifth.
        "targets": (0.75, 0.5, 0.25),
    },
}
_SMOKE = {
    "seeds": (1, 2),
    "probe": 16,
    "evaluated": 256,
    "training.max_steps": 12,
    "training.record_every": 6,
    "training.cold_start": 0.0,
    "pretrain.max_steps": 6,
    "finetune.max_steps": 6,
}


def get_config(name: str = "digits_lenet5") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"table5a"` or `"cifar10_preresnet20,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, {"smoke": _SMOKE})
