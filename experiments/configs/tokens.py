r"""Settings of dynamic tokens (Ni et al. 2023, arXiv:2307.07389, appendix, Table 1).

A name picks the settings. `,smoke` shrinks them to seconds, to see that all parts work:

    python -m experiments.tokens
    python -m experiments.tokens --config=experiments/configs/tokens.py:cifar10,smoke

==========  =====================================================================
digits      the default, ours: 8x8 digits inside scikit-learn, no download
mnist       a small transformer, patches of 4 x 4, one epoch each
cifar10     a larger one
imagenet    DeiT-Tiny, Table 1, for a folder: --config.data.name=FOLDER; published weights
            as the start: --config.model.weights=FILE.safetensors
==========  =====================================================================

First transformers are trained whole, with and without CKA-SR between their blocks. Then each is
trained on with tokens that are dropped at three places, as DynamicViT has it ("no") or with
similarities: of blocks in the "training" of the whole transformer, of tokens in the "decision"
(Eq. 13), or "both" (Algorithm 1). The network from which it starts is the teacher of each. What is
measured is inference, in which dropped tokens are gone.

Training is shorter and plainer than the published one: no mixup, no random augmentation but crops
and flips where `data.augment` is set.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

_BASE: dict[str, Any] = {
    "name": "",
    # Parts of the tokens that each place keeps of those before it.
    "keep": (0.7, 0.9),
    # Where similarities take part: any of no, training, decision, both.
    "cka": "no,both",
    "seeds": (1, 2, 3, 4, 5),
    "data": {"name": "digits", "split_seed": 9, "augment": False, "size": 224},
    # Blocks before which tokens are dropped; a safetensors file with the names of DeiT that every
    # whole transformer starts from.
    "model": {"name": "vit_patch2", "places": (2, 4, 6), "weights": ""},
    # Of the outputs of all blocks, in the training of whole transformers: cka_sr, the sum over
    # pairs (Eq. 11), or aug_cka_sr, their mean (Eq. 14); its weight, the examples of a batch that
    # are compared (0: all), and one batch in how many.
    "cka_sr": {"regulariser": "cka_sr", "coefficient": 1e-2, "samples": 8, "every": 5},
    # Of the decision: the weight of a token's similarity to others, by their "sum" (Eq. 13), their
    # "mean", or its mean less that of all tokens ("relative"). With the former two all tokens are
    # dropped at the start of training where they are much alike, and hardly any comes back. Rows
    # are "heads" of a token or the "batch"; it is taken off the "probability" to be kept or its
    # "logarithm".
    "redundancy": {
        "weight": 0.5,
        "reduce": "relative",
        "rows": "heads",
        "scale": "probability",
        "differentiate": False,
    },
    # Weights of the losses besides the task's: of the part of tokens that is kept, of the logits
    # of the teacher, and of its tokens.
    "losses": {"ratio": 2.0, "distillation": 0.5, "tokens": 0.5},
    # Held-out and test images whose accuracy is measured (0: all).
    "evaluated": 0,
    "pretrain": {
        "epochs": 30,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        # The fraction of the run over which the rate rises; then it falls by a cosine.
        "warmup": 0.1,
        "label_smoothing": 0.1,
        "validation_fraction": 0.1,
        # 0: once an epoch.
        "record_every": 0,
        # 0: epochs decide.
        "max_steps": 0,
    },
    "dynamic": {
        "epochs": 15,
        "batch_size": 64,
        # Of the predictors; the transformer has a part of it, after a fraction of the run in
        # which it stays as it is.
        "learning_rate": 1e-3,
        "backbone": 0.01,
        "fixed": 1 / 6,
        "weight_decay": 0.05,
        "warmup": 1 / 6,
        "label_smoothing": 0.1,
        "record_every": 0,
        "max_steps": 0,
    },
    "checkpoint_seconds": 60.0,
}
# Of hundreds of steps in place of tens of thousands the transformer learns to do without tokens at
# nearly the rate of the predictors. Chosen by held-out digits of one more seed among 0.3 and 1,
# with weights of the ratio of 2 and 10; all were within a point and a half of each other.
_NANO = {
    "model.places": (2, 3, 4),
    "pretrain.batch_size": 32,
    "pretrain.learning_rate": 2e-3,
    "dynamic.batch_size": 32,
    "dynamic.backbone": 0.3,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "digits": {
        **_NANO,
        "model.name": "vit_nano_patch2",
        "pretrain.epochs": 40,
    },
    "mnist": {
        **_NANO,
        "data.name": "mnist",
        "model.name": "vit_nano_patch4",
        "pretrain.epochs": 1,
        "dynamic.epochs": 1,
    },
    "cifar10": {
        "data.name": "cifar10",
        "data.augment": True,
        "model.name": "vit_patch4",
        "pretrain.batch_size": 128,
        "dynamic.batch_size": 128,
        "pretrain.epochs": 200,
        "dynamic.epochs": 30,
    },
    "imagenet": {
        "data.name": "./imagenet",
        "data.augment": True,
        # What is held in memory.
        "evaluated": 10_000,
        "model.name": "deit_tiny",
        "model.places": (3, 6, 9),
        "seeds": (1,),
        "cka_sr.coefficient": 1e-4,
        "pretrain.epochs": 300,
        "pretrain.batch_size": 1024,
        "dynamic.epochs": 30,
        "dynamic.batch_size": 1024,
    },
}
_SMOKE = {
    "seeds": (1, 2),
    "keep": (0.7,),
    "evaluated": 64,
    "pretrain.max_steps": 4,
    "pretrain.record_every": 4,
    "pretrain.batch_size": 16,
    "dynamic.max_steps": 4,
    "dynamic.record_every": 4,
    "dynamic.batch_size": 16,
}


def get_config(name: str = "digits") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"digits"` or `"cifar10,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, {"smoke": _SMOKE})
