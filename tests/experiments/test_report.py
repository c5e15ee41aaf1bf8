"""The report: what it reads, what it says of it, and that what is committed is what it makes."""

import json
import math
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from summaries import cells, table5a, write_summary

from experiments.configs import dam_recommender
from experiments.published import item
from experiments.report import pages, report
from experiments.report_build import answers, build
from experiments.report_commands import (
    COMPARED,
    command,
    configs_of,
    data_of,
    on_any_machine,
    origin_of,
    plain,
)
from experiments.report_document import (
    Code,
    Command,
    Figures,
    Heading,
    Items,
    Link,
    Paragraph,
    Table,
    markdown,
    page,
)
from experiments.report_gather import gather
from experiments.report_readings import READINGS
from experiments.report_short import END, START, prefix_from, put_into, short
from experiments.report_tables import beside, measured
from experiments.statistics import interval, paired, spread

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
EVIL = "<script>alert('x')</script> | a `b` [c](http://d) \n# e"


def test_ours_stand_beside_what_is_published(tmp_path):
    table5a(tmp_path / "a", (1, 2, 3), [0.96, 0.97, 0.98])
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    published, ours = cells(text, "0.1")[:2]
    assert published[:4] == ["0.1", "published", "97.49", "3,900"]
    # Student's t with two degrees of freedom has 4.302653 there.
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert ours[1:3] == ["a (3)", f"97.00 [{97 - half:.2f}, {97 + half:.2f}]"]
    assert ours[-2:] == ["-0.49", "0.03"]
    # Of all other rows what is published alone.
    assert [row[1] for row in cells(text, "0.2")] == ["published"]
    assert "commit not recorded" in text
    assert "dam_pruning.py:table5a --config.seeds=1,2,3 --data_dir=DATA" in text
    assert "Not run: needs an accelerator" in text
    line = cells(text, "Bu et al. 2021, Table 5a", section="")[0]
    assert line[2:] == ["[a](a)", "", "3", "1 of 10", "-0.49 points", "0.03 parameters"]


def test_runs_that_differ_in_seeds_alone_are_one(tmp_path):
    table5a(tmp_path / "a", (1, 2), [0.96, 0.97])
    table5a(tmp_path / "b", (3,), [0.98])
    # These share a seed, or differ in something.
    table5a(tmp_path / "c", (3, 4), [0.98, 0.98])
    table5a(tmp_path / "d", (5,), [0.98], **{"training.epochs": 2})
    runs = gather(tmp_path).runs
    assert [[str(source.folder) for source in run.sources] for run in runs] == [
        ["a", "b"], ["c"], ["d"],
    ]  # fmt: skip
    (row,) = runs[0].rows
    assert row.seeds == (1, 2, 3) and row.values["test_accuracy"] == (0.96, 0.97, 0.98)
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert [row[1] for row in cells(text, "0.1")[:4]] == [
        "published",
        "a and 1 more (3)",
        "c (2)",
        "d (1)",
    ]
    assert "--config.seeds=3, " in text


def test_gains_are_of_the_same_seeds(tmp_path):
    config = dam_recommender.get_config("flixster")
    values = {"none": [0.875, 0.876, 0.874], "dam": [0.871, 0.873, 0.8725]}
    networks = [
        {"gate": gate, "coefficient": 0.1 * (gate == "dam"), "seeds": [1, 2, 3],
         "ensemble_rmse": spread(found), "rmse": spread(found), "dimension": spread([9, 9, 9])}
        for gate, found in values.items()
    ]  # fmt: skip
    write_summary(tmp_path / "a", config, networks=networks)
    (run,) = gather(tmp_path).runs
    expected = paired(values["dam"], values["none"])
    gain = run.rows[1].values["gain"]
    assert interval(gain) == pytest.approx((expected["low"], expected["high"]))
    assert "gain" not in run.rows[0].values
    found = beside(item("dam", "table1_flixster"), {"data": "flixster", "gate": "dam",
                   "ensemble_rmse": [0.8706, 0.0003]}, run)  # fmt: skip
    assert found[0].difference == pytest.approx(np.mean(values["dam"]) - 0.8706)


def test_every_study_can_be_read():
    studies = {path.stem for path in ROOT.glob("experiments/configs/*.py")}
    assert studies - {"__init__", "common"} == READINGS.keys() - {COMPARED}
    for study in READINGS.keys() - {COMPARED}:
        config = json.loads(json.dumps(configs_of(study).get_config().to_dict()))
        assert origin_of(config)[::2] == (study, {})


def test_intervals():
    values = [0.2, 0.5, 0.4, 0.1]
    expected = paired(values, [0.0] * 4)
    assert interval(values) == pytest.approx((expected["low"], expected["high"]))
    assert interval([0.5]) is None and interval([0.5, 0.5]) is None
    column = READINGS["dam_pruning"].values["test_accuracy"]
    assert measured((0.5, 0.5), column) == "50.00" and measured(None, column) == ""


def test_trials_stand_beside_nothing(tmp_path):
    table5a(tmp_path / "a", (1, 2), [0.1, 0.2], **{"training.max_steps": 7})
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "Seen to run: [a](a) (7 steps)." in text
    assert "### a (dam_pruning, 7 steps to see that it works)" in text
    assert [row[1] for row in cells(text, "0.1")[:1]] == ["published"]


def test_what_was_recorded_is_said(tmp_path):
    table5a(tmp_path / "a", (1, 2), [0.96, 0.97])
    called = "python -m experiments.x 'a b'"
    made = [{"command": f"{called} --data_dir=x/y", "version": "1", "commit": "1" * 40}]
    # Where the environment says where data are, a command does not.
    made.append({"command": called, "version": "1", "commit": "2" * 40 + "-changed"})
    (tmp_path / "a" / "provenance.json").write_text(json.dumps({"runs": made}))
    (tmp_path / "a" / "figures").mkdir()
    (tmp_path / "a" / "figures" / "my figure.png").write_bytes(b"")
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "commit `111111111111`, `222222222222-changed`." in text
    assert "```bash\npython -m experiments.x 'a b' --data_dir=DATA\n```" in text
    assert "[my figure.png](a/figures/my%20figure.png)" in text
    assert 'src="a/figures/my%20figure.png"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "given",
    [
        "", " --data_dir=/a/b", " --data_dir '/a b'", " -data_dir x", " '--data_dir=/a b/c'",
        """ --data_dir "/it's" """.rstrip(),
    ],
)  # fmt: skip
def test_no_command_names_a_folder_of_one_machine(given):
    line = f"python -m experiments.x{given} --workdir=w"
    assert on_any_machine(line, "mnist") == "python -m experiments.x --workdir=w --data_dir=DATA"
    for data in ("digits", "pydoc", "a.npz"):
        assert on_any_machine(line, data) == "python -m experiments.x --workdir=w"
    # It has no such flag.
    line = f"python -m experiments.sparse_training_compare --runs='a b'{given}"
    expected = "python -m experiments.sparse_training_compare '--runs=a b'"
    assert on_any_machine(line, "mnist") == expected
    assert on_any_machine("it's none", "mnist") == "it's none"


def test_a_report_whose_summary_is_not_there(tmp_path):
    table5a(tmp_path / "a", (1, 2), [0.96, 0.97])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.md").write_text("# Structured pruning with gates: table8\n\nx\n")
    (tmp_path / "b" / "notes.md").write_text("# Notes\n")
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "The summary is not here, its report is: [b/report.md](b/report.md)." in text
    assert "| [b/report.md](b/report.md) | Structured pruning with gates | `table8` |" in text
    assert "notes.md" not in text
    # The report itself is none of them.
    assert report(tmp_path).alone == gather(tmp_path).alone


class Tags(HTMLParser):
    """What a page holds."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_texts_are_no_markup():
    blocks = [
        Heading(2, EVIL), Paragraph([EVIL, Code(EVIL), Link(EVIL, EVIL)]), Items([EVIL]),
        Table([EVIL, "b"], [[EVIL, [Code(EVIL)]]]), Command([EVIL, "```"]), Figures([EVIL]),
    ]  # fmt: skip
    tags = Tags()
    tags.feed(page(EVIL, blocks))
    assert not tags.open
    assert "script" not in {tag for tag, _ in tags.seen}
    assert sum("<script>alert('x')</script>" in text for text in tags.texts) == 10
    for tag, attributes in tags.seen:
        assert not {"onload", "onerror", "onclick"} & attributes.keys()
        if tag in ("a", "img"):
            assert re.fullmatch(r"[\w%/.~'-]+", attributes.get("href") or attributes["src"])
    text = markdown(blocks)
    assert "<script>" not in re.sub(r"(`+).*?\1", "", text, flags=re.S)
    assert "](http://d)" not in re.sub(r"\\.", "", re.sub(r"(`+).*?\1", "", text, flags=re.S))
    # The fence is longer than what stands in it, and a table is three lines.
    assert "````bash\n" in text
    table = next(part for part in text.split("\n\n") if "| --- |" in part)
    rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines()]
    assert [len(row) for row in rows] == [4, 4, 4]


def test_a_readme_has_both_markers(tmp_path):
    text = f"a\n{START}\nold\n{END}\nb\n"
    once = put_into(text, [Paragraph("new")])
    assert once == f"a\n{START}\n\nnew\n\n{END}\nb\n" == put_into(once, [Paragraph("new")])
    for wrong in ("", START, f"{END}{START}", text * 2):
        with pytest.raises(ValueError, match="report"):
            put_into(wrong, [])
    table5a(tmp_path / "results" / "a", (1, 2), [0.96, 0.97])
    (tmp_path / "README.md").write_text(text)
    report(tmp_path / "results", tmp_path / "README.md")
    assert "| [a](results/a) |" in (tmp_path / "README.md").read_text()
    assert prefix_from(tmp_path / "a" / "page.md", tmp_path / "b") == "../b/"


def settings_of(line, monkeypatch):
    """What a command line sets, its fields read as the flags of the studies are."""
    (python, _, module, config), rest = shlex.split(line)[:4], shlex.split(line)[4:]
    file, name = config.removeprefix("--config=").split(":")
    study = module.removeprefix("experiments.")
    assert python == "python" and file == f"experiments/configs/{study}.py"
    # Where the flag of a config looks for its fields.
    monkeypatch.setattr(sys, "argv", ["", *rest])
    values = flags.FlagValues()
    config = configs_of(study).get_config(name)
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    flags.DEFINE_string("data_dir", None, "", flag_values=values)
    values(sys.argv)
    return plain(values.config)


SUMMARIES = sorted(RESULTS.rglob("summary.json"))


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_commands_repeat_what_was_run(path, monkeypatch):
    config = json.loads(path.read_text()).get("config")
    if config is None:
        pytest.skip("a comparison of studies has no settings of its own")
    study, settings, changed = origin_of(config)
    line = command(study, settings["name"], changed, data_of(settings))
    assert settings_of(line, monkeypatch) == settings
    # What the summary says, where the study still has it.
    named = plain(configs_of(study).get_config(settings["name"]))
    for name, value in config.items():
        if not isinstance(value, dict):
            assert settings[name] == value
        else:
            shared = value.keys() & named[name].keys()
            assert {key: settings[name][key] for key in shared} == {
                key: value[key] for key in shared
            }


def test_all_that_is_committed_is_read():
    gathered = gather(RESULTS)
    assert not gathered.problems
    assert sum(len(run.sources) for run in gathered.runs) == len(SUMMARIES)
    blocks = build(gathered, short(answers(gathered)))
    made, html = pages(blocks)
    # Whatever is known of commits here: archives and shallow clones have no history.
    commits = re.compile(r"; the summary was committed with (<code>|`)?\w+(</code>|`)?")
    for name, text in (("REPORT.md", made), ("report.html", html)):
        committed = (RESULTS / name).read_text()
        assert commits.sub("", committed) == commits.sub("", text), (
            f"results/{name} is old: python -m experiments.report --readme=README.md"
        )
        assert len(committed) < 1_000_000
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    for tag, attributes in tags.seen:
        link = attributes.get("href") or attributes.get("src")
        if tag in ("a", "img") and not link.startswith("https://"):
            assert (RESULTS / link).exists(), link
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", made):
        assert (RESULTS / link).exists(), link


def test_the_readme_has_the_short_form():
    readme = (ROOT / "README.md").read_text()
    blocks = short(answers(gather(RESULTS)), "results/")
    assert put_into(readme, blocks) == readme, (
        "README.md is old: python -m experiments.report --readme=README.md"
    )


def test_the_command(tmp_path):
    table5a(tmp_path / "a", (1, 2), [0.96, 0.97])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text("{")
    line = [sys.executable, "-m", "experiments.report"]
    done = subprocess.run(
        [*line, f"--results={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(tmp_path / n) for n in ("REPORT.md", "report.html")]
    assert done.stderr.startswith(f"not read: {tmp_path / 'b' / 'summary.json'}: it is no JSON")
    failed = subprocess.run(
        [*line, f"--results={tmp_path}", f"--readme={tmp_path / 'no.md'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr.strip() == (
        f"error: {tmp_path / 'no.md'} cannot be read (No such file or directory): "
        "choose a file with --readme"
    )
