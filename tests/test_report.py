"""The report: the same figures as text, JSON and a page; written whole or not at all."""

import errno
import json
import math
import os
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
import torch

import convexprune
from convexprune.layer import Layer
from convexprune.network.compact import Compaction
from convexprune.patterns import Unstructured
from convexprune.problems import L1Reconstruction, NetTrim, Reconstruction
from convexprune.prune import prune
from convexprune.report import Link, MergeReport, NetworkError, Report, Settings, described
from convexprune.report.blocks import blocks
from convexprune.report.merges import MergedLayer
from convexprune.report.row import HEADINGS, Moments, Row
from convexprune.report.shares import Share, Shares
from convexprune.solution import Certificate, Status, TracePoint
from convexprune.solvers import ADMM

TRACE = (TracePoint(0.1, Certificate(3.0, 0.0, 0.5)), TracePoint(0.25, Certificate(2.0, 1.999994, 0.0)))


@pytest.fixture
def report():
    pattern = torch.eye(4)[:, :3]
    rows = (
        Row("fc1", (4, 3), 3, Status.CONVERGED, Certificate(2.0, 1.999994, 0.0), 0.5, "NetTrim(epsilon=0.05)", 120,
            1.25, TRACE, pattern),
        Row("<fc2>", (2, 4), 8, Status.INFEASIBLE, Certificate(2.0, float("inf"), 0.125), 0.75, "NetTrim()", 7, 0.5),
        Row("fc3", (10, 2), 20),
    )  # fmt: skip
    network = NetworkError(measured=0.6, guaranteed=1.5, scale=12.0)
    settings = Settings("cascade", "ADMM()", 30, "ab" * 32, "float32", 0, 2, torch.__version__)
    return Report(rows, network, settings)


def test_json_round_trip(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text


def test_json_is_strict_and_says_what_a_reader_looks_for(report):
    content = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    first, second, third = content["rows"]
    assert first["kept_fraction"] == 0.25
    assert first["status"] == "CONVERGED"
    assert first["certificate"]["relative_gap"] == pytest.approx(3e-6)
    assert first["trace"][1]["seconds"] == 0.25
    assert second["certificate"]["bound"] == "inf"
    assert third["certificate"] is None
    assert content["network"] == {
        "measured": 0.6,
        "guaranteed": 1.5,
        "scale": 12.0,
        "reason": "",
        "rules": {},
        "layers": [],
        "wanted": None,
    }


def test_totals(report):
    assert (report.kept, report.total) == (31, 40)
    assert report.kept_fraction == 31 / 40


def test_table_is_aligned_and_readable(report):
    heading, *lines = report.table().splitlines()
    assert heading.split() == list(HEADINGS)
    assert len(lines) == 3
    assert lines[0].split() == ["fc1", "4", "x", "3", "25.0%", "3e-06", "feasible", "2", "1.99999", "0.5", "converged",
                                "120", "1.2", "s"]  # fmt: skip
    assert "off by 12.5%" in lines[1]
    assert "infeasible: left dense" in lines[1]
    assert lines[2].count(" - ") + lines[2].endswith("-") >= 5
    end = heading.index("kept") + len("kept")
    assert all(line[:end].endswith("%") for line in lines)


def test_text_says_guaranteed_beside_measured(report):
    text = str(report)
    assert "kept 11 of 20 weights that were to be pruned (55.0%)" in text  # nothing was asked of fc3
    assert "guaranteed: 1.5 = 12.5% of the outputs' norm" in text
    assert "measured:   0.6 = 5.0% of the outputs' norm" in text
    without = replace(report, network=NetworkError(0.6, None, 12.0, "the network branches"))
    assert "no guarantee: the network branches" in str(without)


@pytest.mark.parametrize(
    ("violation", "words"),
    [(0.0, "feasible"), (6e-7, "feasible to 6e-07"), (2e-6, "off by 2e-06"), (0.5, "off by 50.0%")],
)
def test_feasible_is_exact_or_says_how_nearly(violation, words, report):
    cells = replace(report.rows[0], certificate=Certificate(1.0, 1.0, violation)).cells()
    assert cells[HEADINGS.index("constraints")] == words


def test_an_infeasible_point_has_no_gap(report):
    cells = replace(report.rows[0], certificate=Certificate(0.0, 1.0, 0.5)).cells()
    assert cells[HEADINGS.index("gap")] == "-"


@pytest.mark.parametrize("gap", [0.0, 1e-9, 2.5e-7, 0.03, 1.0, 40.0, -2e-7])
def test_gaps_are_never_shown_as_better_than_zero_where_they_are_not(gap, report):
    certificate = Certificate(1.0, 1.0 - gap, 0.0)
    cells = replace(report.rows[0], certificate=certificate).cells()
    shown = cells[HEADINGS.index("gap")]
    number = float(shown.rstrip("%")) / (100 if shown.endswith("%") else 1)
    assert number == pytest.approx(certificate.relative_gap, rel=0.3, abs=0)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.cells, self.open, self.cell = [], [], [], None

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag == "td":
            self.cell = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self.cells.append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def test_page_is_well_formed_and_self_contained(report, tmp_path):
    report.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.cells == [cell for row in report.rows for cell in row.cells()]
    assert len(page.sources) == 4  # network, layers, one run, one pattern
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"<(script|link|iframe)", text)
    assert "<fc2>" not in text
    for word in ("no feasible layer can go below", "guaranteed", "Convergence", "Weight patterns", "ab" * 32):
        assert word in text


def test_page_without_patterns_traces_and_guarantee(report, tmp_path):
    bare = replace(Report.from_json(report.to_json()), network=NetworkError(None, None, None, "two outputs"))
    bare = replace(bare, rows=tuple(replace(row, trace=()) for row in bare.rows))
    bare.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Convergence" not in text
    assert "Weight patterns" not in text
    assert "no guarantee: two outputs" in text


def test_page_survives_figures_that_are_not_finite(report, tmp_path):
    odd = (TracePoint(0.1, Certificate(float("inf"), -float("inf"), float("inf"))), *TRACE)
    rows = (replace(report.rows[0], certificate=Certificate(1.0, -float("inf"), 0.0), trace=odd), *report.rows[1:])
    replace(report, rows=rows, network=NetworkError(0.6, float("inf"), 12.0)).save_html(tmp_path / "report.html")


def test_page_is_the_same_twice(report, tmp_path):
    for name in ("a", "b"):
        report.save_html(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["save_json", "save_html"])
def test_an_unwritable_path_is_named(report, tmp_path, kind):
    path = tmp_path / "missing" / "report"
    with pytest.raises(OSError, match="was not written") as raised:
        getattr(report, kind)(path)
    assert raised.value.filename == str(path)


@pytest.mark.parametrize("kind", ["save_json", "save_html"])
def test_a_full_disk_leaves_the_old_file_and_no_part(report, tmp_path, kind, monkeypatch):
    path = tmp_path / "report"
    path.write_text("old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        getattr(report, kind)(path)
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_problems_and_solvers_in_a_few_words():
    layer = Layer.from_samples(torch.eye(3), torch.ones(5, 3))
    assert described(NetTrim(layer, 0.05)) == "NetTrim(epsilon=0.05)"
    assert described(NetTrim(layer, 0.05, torch.zeros(5, 3))) == "NetTrim(epsilon=0.05, slack=array (5, 3))"
    assert described(L1Reconstruction(layer, 0.1)) == "L1Reconstruction(lam=0.1)"
    assert described(ADMM()).startswith("ADMM(eps_abs=1e-06, ")
    assert described(object()) == "object"


def test_moments_and_wanted_counts_are_reported(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 8)  # fewer samples than inputs
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    for fraction, rank in ((0.0, 5), (0.1, 8)):
        _, report = prune(model, [x], lambda layer, f=fraction: Reconstruction(layer.damped(f), Unstructured(0.25)))
        (row,) = report.rows
        assert row.wanted == row.kept == 8
        assert row.moments.rank == rank
        assert row.moments.damping == fraction
        assert ("singular Gram matrices: 0: rank 5 of 8" in str(report)) == (rank < 8)
        assert Report.from_json(report.to_json()).rows[0].moments == row.moments
        report.save_html(tmp_path / "page.html")
        assert f"rank {rank} of 8" in (tmp_path / "page.html").read_text()
    assert isinstance(row.moments, Moments)


def test_the_settings_say_which_version_ran(report, tmp_path):
    assert report.settings.version == convexprune.__version__
    content = json.loads(report.to_json())
    assert content["settings"]["version"] == convexprune.__version__
    content["settings"]["version"] = "7.5"
    assert Report.from_json(json.dumps(content)).settings.version == "7.5"


# as convexprune 0.1.0 wrote it: no schema, no version, and a report of one layer
BEFORE = """
{"settings": {"mode": "parallel", "solver": "ADMM()", "samples": 5, "data": "ab", "dtype": "torch.float32", "seed": 0,
  "threads": 1, "torch": "2.13.0"},
 "network": {"measured": 0.25, "guaranteed": "inf", "scale": 2.0, "reason": "", "rules": {"spectral": "inf"},
  "layers": [{"name": "fc", "guaranteed": 0.5, "measured": 0.25}], "wanted": null},
 "kept": 3, "total": 4,
 "rows": [{"name": "fc", "shape": [2, 2], "kept": 3, "status": "MAX_ITER",
  "certificate": {"value": 2.0, "bound": "-inf", "violation": 0.0, "relative_gap": "inf"}, "error": 0.5,
  "problem": "NetTrim()", "iterations": 7, "seconds": 0.5,
  "trace": [{"seconds": 0.25, "value": 3.0, "bound": 1.0, "violation": 0.5}],
  "wanted": null, "moments": {"damping": 0.0, "rank": 1, "inputs": 2, "condition": "inf"}, "repairs": false,
  "total": 4, "kept_fraction": 0.75}],
 "allocation": null}
"""


def test_a_report_of_the_version_before_is_read():
    read = Report.from_json(BEFORE)
    (row,) = read.rows
    assert row.certificate == Certificate(2.0, -math.inf, 0.0)
    assert row.trace == (TracePoint(0.25, Certificate(3.0, 1.0, 0.5)),)
    assert row.moments == Moments(0.0, 1, 2, math.inf)
    assert read.network.rules == {"spectral": math.inf}
    assert read.settings.version == "before 0.2.0"
    assert Report.from_json(read.to_json()) == read


def places(value, path=()):
    """The path of every entry of nested lists and dicts."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield (*path, key)
        yield from places(part, (*path, key))


PLACES = list(places(json.loads(BEFORE)))
WRONG = [None, True, -1.5, 3, 10**400, "words", "inf", [], [[]], {}, {"a": 1}]


def changed(path, change):
    """The report of before with the entry at a path changed; the sentence it is refused in, or what is read."""
    content = json.loads(BEFORE)
    spot = content
    for key in path[:-1]:
        spot = spot[key]
    change(spot, path[-1])
    try:
        return Report.from_json(json.dumps(content)), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_whatever_stands_anywhere_it_is_a_report_or_a_sentence(wrong):
    refused = 0
    for path in PLACES:
        read, words = changed(path, lambda spot, key: spot.__setitem__(key, wrong))
        if read is None:
            refused += 1
            assert words.startswith("the text is no pruning report: ")
            assert "\n" not in words
            assert len(words) < 300
        else:
            assert str(read)
            assert read._repr_html_()
            assert Report.from_json(read.to_json()).to_json() == read.to_json()
    assert refused > 10


def test_what_is_missing_is_named():
    missed = 0
    for path in PLACES:
        _, words = changed(path, lambda spot, key: spot.__delitem__(key))
        if words:
            missed += 1
            assert f"{path[-1]} is missing" in words or "expected a list of 2" in words
    assert missed > 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("report.json", "not JSON"),
        ("\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("null", "JSON NoneType"),
        ("[]", "JSON list"),
        ("3", "JSON int"),
        ("{}", "rows is missing"),
        ('{"rows": []}', "network is missing"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": "1"}', "schema '1'"),
        ('{"schema": null}', "schema None"),
    ],
)
def test_a_text_that_is_no_report_is_refused_in_a_sentence(text, words):
    with pytest.raises(ValueError, match="report") as raised:
        Report.from_json(text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [None, 3, b"{}", {}])
def test_a_report_is_read_from_text(value):
    with pytest.raises(TypeError, match="text of its JSON file; got a"):
        Report.from_json(value)


def test_wrong_values_are_named_with_their_place(report):
    def refused(change):
        content = json.loads(report.to_json())
        change(content)
        with pytest.raises(ValueError, match="no pruning report") as raised:
            Report.from_json(json.dumps(content))
        return str(raised.value)

    assert "rows[0].kept is 2.5, expected a whole number" in refused(lambda c: c["rows"][0].update(kept=2.5))
    assert "rows[1].status is 'DONE', expected one of CONVERGED, " in refused(
        lambda c: c["rows"][1].update(status="DONE")
    )
    assert "rows[1].shape is [3], expected a list of 2" in refused(lambda c: c["rows"][1].update(shape=[3]))
    assert "settings.seed is True, expected a whole number" in refused(lambda c: c["settings"].update(seed=True))
    assert "network.measured is 'x', expected a number" in refused(lambda c: c["network"].update(measured="x"))
    assert "rows[0].certificate.bound is missing" in refused(lambda c: c["rows"][0]["certificate"].pop("bound"))


# names that a page, a plot or a notebook could take for something else
NAMES = (
    "<script>alert(1)</script>", "a&amp;b", '"quoted"', "<fc>", "$x_1$", r"$\frac$", "two\nlines", "ä→ß", "{x}", "",
)  # fmt: skip


def test_any_name_is_shown_as_it_is(report, tmp_path):
    rows = tuple(replace(report.rows[0], name=name, trace=TRACE if "$" in name else ()) for name in NAMES)
    links = tuple(Link(name, 2.0, 1.0) for name in NAMES)
    shares = tuple(Share(name, 1, 2, 0.5, (0.5,), (0.5,)) for name in NAMES)
    allocation = Shares(shares, 2.0, 1.0, Certificate(0.5, 0.5, 0.0), NAMES[0])
    network = replace(report.network, layers=links, reason=" ".join(NAMES))
    named = Report(rows, network, report.settings, allocation)
    named.save_html(tmp_path / "report.html")
    compaction = Compaction(dict.fromkeys(NAMES, 1), NAMES, (6, 3))
    proof = Certificate(0.5, 0.0, 0.0)
    merged = tuple(MergedLayer(name, 3, 2, 0.5, 0.5, proof, (0.5, 1.0), 1, False) for name in NAMES)
    MergeReport(merged, compaction).save_html(tmp_path / "merges.html")
    pages = [(tmp_path / "report.html").read_text(), (tmp_path / "merges.html").read_text(), named._repr_html_()]
    for text in pages:
        page = Page()
        page.feed(text)
        assert page.open == []
        assert not re.search(r"<(script|fc)>", text)
    assert page.cells == [cell for row in rows for cell in row.cells()]
    assert page.cells[:: len(HEADINGS)] == list(NAMES)


def test_a_notebook_shows_the_table_and_the_summary_without_pictures(report):
    shown = report._repr_html_()
    assert "<img" not in shown
    assert "<style" not in shown
    for line in report.summary():
        assert escape(line) in shown


def test_the_json_of_a_merging_is_strict():
    merged = MergedLayer("fc", 3, 2, 0.5, math.inf, Certificate(0.5, -math.inf, math.nan), (0.5, 1.0), 1, False)
    text = MergeReport((merged,), Compaction({"fc": 1}, (), (6, 3)), 0.5, 1.0).to_json()
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["layers"][0]["certificate"] == {"value": 0.5, "bound": "-inf", "violation": "nan"}
    assert content["layers"][0]["change"] == "inf"
    assert content["compaction"]["parameters"] == [6, 3]


@pytest.fixture
def large(report):
    """300 layers: 42 blocks of 7, and 6 layers beside them."""
    names = [f"model.layers.{block}.mlp.{part}" for block in range(42) for part in "abcdefg"]
    names += ["lm_head", "a.b", "a.c", "conv", "norm.1", "norm.2"]
    rows = tuple(
        replace(report.rows[0], name=name, module=name, certificate=Certificate(1.0, 1.0 - place / 1e3, 0.0))
        for place, name in enumerate(names)
    )
    links = tuple(Link(name, 2.0, 1.0) for name in names)
    return replace(report, rows=rows, network=replace(report.network, layers=links))


def test_a_large_report_has_a_line_for_each_block(large):
    lines = large.overview().splitlines()
    assert lines[0].split() == ["block", "layers", "kept", "largest", "gap", "constraints", "left", "dense", "time"]
    assert len(lines) == 1 + 42 + 4 + 2  # norm.1 and norm.2 are one block, a.b and a.c another
    assert lines[1].split() == ["model.layers.0", "7", "25.0%", "6e-03", "feasible", "0", "8.8", "s"]
    assert "300 layers" in lines[-1]
    assert large.overview() in str(large)
    assert len(large.table().splitlines()) == 301


def test_a_small_report_is_its_table(report):
    assert report.overview() == report.table()


def test_a_block_shows_the_worst_of_its_layers(report):
    (block,) = blocks(tuple(replace(row, name=f"x.1.{row.name}") for row in report.rows))
    assert block.cells() == ("x.1", "3", "77.5%", "3e-06", "off by 12.5%", "2", "1.8 s")


def test_a_large_page_folds_its_table_and_draws_the_worst(large, tmp_path):
    large.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert text.count("<details>") == 46
    assert len(page.cells) == 300 * len(HEADINGS)
    assert len(page.sources) == 3 + 2 * 12  # network, links, layers; runs and patterns of the largest gaps
    assert text.index("The network") < text.index("Layers")
    assert len(text) < 3e6


def test_a_gap_is_drawn_only_where_the_point_is_feasible(report):
    off = replace(report.rows[0], certificate=Certificate(2.0, 1.0, 0.5))
    for row, drawn in ((report.rows[0], 1), (off, 0), (report.rows[1], 0), (report.rows[2], 0)):
        axes = replace(report, rows=(row,)).plot("gap")
        assert len(axes.lines) == drawn
        assert (row.gap is not None) == bool(drawn)


def test_a_picture_is_drawn_on_the_axes_that_are_given(report):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert report.plot(ax=axes) is axes
    assert [bar.get_width() for bar in axes.patches] == [25.0, 100.0, 100.0]
    assert [label.get_text() for label in report.plot("gap").get_xticklabels()] == ["0", "1e-9", "1e-6", "0.1%", "100%"]
    links = replace(report, network=replace(report.network, layers=(Link("fc1", 2.0, 1.0),)))
    axes = links.plot("errors")
    axes.get_figure().canvas.draw()
    labels = [label.get_text() for label in axes.get_xticklabels(which="both")]
    assert any(labels)
    assert not any("$" in label for label in labels)
    with pytest.raises(ValueError, match="what is 'pie'"):
        report.plot("pie")
    with pytest.raises(ValueError, match="there is no guarantee"):
        report.plot("errors")


def test_names_of_many_layers_do_not_cover_one_another(large):
    axes = large.plot("kept")
    assert len(axes.get_yticklabels()) <= 45
    assert axes.get_yticklabels()[0].get_text() == "model.layers.0.mlp.a"
    assert axes.get_figure().get_size_inches()[1] <= 14


@pytest.mark.parametrize(("mode", "advice"), [("parallel", True), ("cascade", False)])
def test_a_guarantee_that_says_nothing_says_so(report, tmp_path, mode, advice):
    settings = replace(report.settings, mode=mode)
    empty = replace(report, settings=settings, network=NetworkError(0.6, 12.1, 12.0))
    (line,) = empty.remarks()
    assert "says nothing" in line
    assert ('mode="cascade"' in line) == advice
    assert line in str(empty)
    empty.save_html(tmp_path / "report.html")
    assert escape(line) in (tmp_path / "report.html").read_text()
    for network in (NetworkError(0.6, 12.0, 12.0), NetworkError(0.6, None, 12.0), NetworkError(0.6, 5.0, 0.0)):
        assert replace(empty, network=network).remarks() == ()


def test_a_dict_is_the_json(report):
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in report.to_dict()["rows"]] == ["fc1", "<fc2>", "fc3"]


def test_the_page_says_which_problems_were_stated(report, tmp_path):
    rows = (report.rows[0], replace(report.rows[0], name="fc9"), *report.rows[1:])
    named = replace(report, rows=rows)
    assert named.problems == {"NetTrim(epsilon=0.05)": 2, "NetTrim()": 1}
    named.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "NetTrim(epsilon=0.05): 2 layers" in text
    assert "NetTrim(): 1 layer<" in text


def test_a_summary_names_a_few_layers_and_counts_the_others(large):
    rows = tuple(replace(row, note="float64 began anew", moments=Moments(0.1, 1, 2, math.inf)) for row in large.rows)
    lines = replace(large, rows=rows).summary()
    assert sum("and 294 more" in line for line in lines) == 3
    assert max(map(len, lines)) < 700
    assert "more" not in "".join(replace(large, rows=rows[:6]).summary())
