r"""DAM against an L1 norm: which autoencoder needs fewer channels for the same images?

One command trains autoencoders of images whose bottleneck has gates, at every coefficient and
seed as one program for each kind of gate, trains a classifier on the codes of each, and writes
summary.json, report.md, metrics and figures into the work directory. The same command after an
interruption goes on where it stopped.

    python -m experiments.dam_autoencoder
    python -m experiments.dam_autoencoder \
        --config=experiments/configs/dam_autoencoder.py:mnist --data_dir=$HOME/tensorflow_datasets

Without flags it runs on the handwritten digits inside scikit-learn.
"""

from experiments import cli
from experiments.configs import dam_autoencoder as configs

if __name__ == "__main__":
    cli.start("dam_autoencoder", configs, doc=__doc__)
