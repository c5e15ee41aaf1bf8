r"""Dynamic tokens: vision transformers that go on with some of an image's patches.

One command trains transformers with and without CKA-SR, then each with tokens that are dropped on
the way, at every keep ratio and seed, and writes summary.json, report.md, metrics, networks and a
figure into the work directory. The same command after an interruption goes on where it stopped.

    python -m experiments.tokens
    python -m experiments.tokens --config=experiments/configs/tokens.py:cifar10 \
        --data_dir=$HOME/tensorflow_datasets --workdir=runs/tokens

Without flags it runs on the handwritten digits inside scikit-learn.
"""

from experiments import cli
from experiments.configs import tokens as configs

if __name__ == "__main__":
    cli.start("tokens", configs, doc=__doc__)
