r"""Settings of DAM in graph autoencoders (Bu et al. 2021, arXiv:2110.01684, Fig. 4).

A name picks the settings. `,smoke` shrinks them to seconds, to see that all parts work:

    python -m experiments.dam_graph
    python -m experiments.dam_graph \
        --config=experiments/configs/dam_graph.py:citeseer,smoke --data_dir=$HOME/data

==========  ======================================================================
blocks      the default, ours: 600 nodes of a made graph, no download
cora        Fig. 4, from the files `ind.cora.*` in the folder, or its `planetoid`
citeseer    the same
pubmed      the same
==========  ======================================================================

`,variational` makes them variational graph autoencoders. `--config.data.download=True` fetches the
files of Cora or CiteSeer that are not in the folder `planetoid` of `--data_dir`.

Graph convolutions to 32 and 16 numbers for each node, inner products as logits of links; Adam
without decay, 1,000 steps on the whole graph, and the coefficients of the paper's range (0.01 to
5). The loss is the cross-entropy of links and of other pairs drawn anew in each step, two for each
link and one for each node (as the published example draws them), plus
lambda times the offset. The published example adds 1e-15 inside logarithms, see
`ntt_sparse.models.graph.link_loss`.

The paper varied lambda "for both GAE and GAE-DAM", and plain autoencoders have none: they are
trained here at each embedding size that DAM ended with, with the same seeds. A seed draws weights,
negative pairs and the split of the links, where the published example has one for all. Networks
are those after the last step, and test links choose nothing.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

_BASE: dict[str, Any] = {
    "name": "",
    "coefficients": (0.01, 0.1, 0.5, 1.0, 2.0, 5.0),
    "seeds": (1, 2, 3, 4, 5),
    # Embedding sizes of plain autoencoders; empty: each that DAM ended with, and the whole.
    "sizes": (),
    # Offset to start from.
    "initial": 1.0,
    "data": {
        "name": "blocks",
        "download": False,
        # Parts of the links that are held out.
        "validation_fraction": 0.05,
        "test_fraction": 0.1,
    },
    "model": {"hidden": 32, "bottleneck": 16, "variational": False},
    "training": {
        # Each epoch is one step on the whole graph.
        "epochs": 1000,
        "learning_rate": 0.01,
        "record_every": 50,
        # 0: epochs decide.
        "max_steps": 0,
    },
    "checkpoint_seconds": 60.0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "blocks": {"seeds": (1, 2, 3)},
    **{name: {"data.name": name} for name in ("cora", "citeseer", "pubmed")},
}
_OPTIONS = {
    "variational": {"model.variational": True},
    "smoke": {"seeds": (1, 2), "training.max_steps": 20, "training.record_every": 10},
}


def get_config(name: str = "blocks") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"cora"` or `"citeseer,variational,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, _OPTIONS)
