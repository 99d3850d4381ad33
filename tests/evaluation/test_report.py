"""The report of a run: what it says of itself, of its loss, and of how little a few rows tell."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from minmacpo.config.schema import Config
from minmacpo.data.splits import TOO_FEW
from minmacpo.evaluation.report import training_charts, write_report
from minmacpo.evaluation.story import tell_story
from minmacpo.evaluation.table import too_few_to_tell, too_few_warnings

PAPER = "https://arxiv.org/abs/2410.07672"
OWN_DATA = SimpleNamespace(has_gold=False)
WORLD = SimpleNamespace(has_gold=True)


@pytest.fixture(scope="module")
def page(stub) -> str:
    write_report(stub)
    return (stub / "report.html").read_text()


def test_its_title_is_the_run(page):
    assert "<title>stub</title>" in page
    assert "<h1>stub</h1>" in page


def test_it_says_what_macpo_student_and_teachers_are_and_links_the_paper(page):
    (intro,) = re.findall('<p class="intro">(.*?)</p>', page, re.DOTALL)

    assert f'href="{PAPER}"' in intro
    assert "<b>student</b>" in intro
    assert "<b>teachers</b>" in intro
    assert not re.findall(r"\. [A-Z]", intro), "one sentence"


def test_its_legend_explains_every_column_of_the_table(page):
    section = page.split("<h2>Table</h2>")[1].split("</section>")[0]
    headings = re.findall('<th scope="col">([^<]+)</th>', section)
    explained = re.findall("<dt>(.*?)</dt>", section)

    assert headings == explained
    assert {"gold", "ppl/char"} <= set(headings)


def test_a_table_that_is_too_wide_shows_that_it_scrolls(page):
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    (rule,) = re.findall(r"\n\.scroll\{(.*?)\}", style, re.DOTALL)

    assert "overflow-x:auto" in rule
    assert rule.count("var(--shade)") == 2


@pytest.mark.parametrize(
    ("loss", "name", "speaks_of_reference"),
    [("sigmoid", "DPO", True), ("ipo", "IPO", True), ("simpo", "SimPO", False)],
)
def test_training_is_told_in_the_words_of_the_loss(loss, name, speaks_of_reference):
    config = Config()
    charts = training_charts(replace(config, dpo=replace(config.dpo, loss=loss)))
    notes = {chart.title: chart.note for chart in charts}

    assert notes["Loss in the rounds"].startswith(f"{name} ")
    assert ("reference" in notes["Reward margin"]) == speaks_of_reference


@pytest.mark.parametrize("count", [1, 7, TOO_FEW - 1])
def test_few_test_rows_are_too_few_to_tell(count):
    rows = [{"agent": "student", "pairs": count, "prompts": 100}]

    (sentence,) = tell_story(OWN_DATA, rows)
    (warning,) = too_few_warnings(OWN_DATA, rows)
    assert f"{count} test rows are too few to tell" in sentence
    assert f"{count} test rows are too few to tell" in warning


def test_enough_test_rows_are_not_too_few():
    rows = [{"agent": "student", "pairs": TOO_FEW, "prompts": TOO_FEW}]

    assert too_few_to_tell(OWN_DATA, rows) is None
    assert too_few_to_tell(WORLD, [{"prompts": 8}]) is None, "the world's gold has an interval"
    assert too_few_to_tell(OWN_DATA, []) is None, "nothing has been measured yet"
