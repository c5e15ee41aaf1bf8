r"""Neural Tangent Transfer: sparse networks initialised without labels, and their rivals.

One command transfers a dense teacher's outputs and tangent kernel to sparse students,
trains them beside dense, random, SNIP, Logit-SNIP and magnitude-pruned networks, and
writes summary.json, report.md, metrics and figures into the work directory. The same
command after an interruption goes on where it stopped.

    python -m experiments.ntt
    python -m experiments.ntt --config=experiments/configs/ntt.py:mnist_lenet300 \
        --config.density=0.03 --config.seeds=1,2,3,4,5 --workdir=runs/mnist

Without flags it runs on the handwritten digits inside scikit-learn.
"""

from experiments import cli
from experiments.configs import ntt as configs

if __name__ == "__main__":
    cli.start("ntt", configs, doc=__doc__, distributed=True)
