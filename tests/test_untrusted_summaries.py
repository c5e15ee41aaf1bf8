"""Summaries of studies, changed in every way: the report says so in one line, or reads them."""

import json
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from fuzzing import CHANGES, damaged, damages, fuzzed, replaced, written

from experiments.report import pages
from experiments.report_build import answers, build
from experiments.report_gather import gather
from experiments.report_short import short

RESULTS = Path(__file__).parents[1] / "results"
SUMMARIES = (
    "ntt/mnist_lenet300_all_ntt",
    "dam/linear",
    "dam/mnist_rivals/dam_5",
    "recommenders/flixster",
    "cka/cifar10_resnet20_30_steps",
)


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries_that_say_something_else_are_one_line_or_a_report(name, tmp_path):
    known = (RESULTS / name / "summary.json").read_text()

    @fuzzed(st.lists(CHANGES, min_size=1, max_size=2))
    def test(changes):
        summary = json.loads(known)
        for where, value in changes:
            replaced(summary, where, value)
        folder = written(tmp_path, {"run/summary.json": json.dumps(summary).encode()})
        gathered = gather(folder)
        assert len(gathered.runs) + len(gathered.problems) == 1
        for line in gathered.problems:
            assert "\n" not in line and len(line) < 1500 and str(folder) in line
        pages(build(gathered, short(answers(gathered))))

    test()


@fuzzed(damages())
def test_summaries_of_damaged_bytes_are_one_line_or_a_report(how):
    known = (RESULTS / "dam" / "linear" / "summary.json").read_bytes()
    with tempfile.TemporaryDirectory() as root:
        folder = written(Path(root), {"run/summary.json": damaged(known, how)})
        gathered = gather(folder)
        assert len(gathered.runs) + len(gathered.problems) == 1
        assert all("\n" not in line for line in gathered.problems)
