"""The report: verdicts follow from the rule, what is written is whole, plain and safe to open."""
import json
import math

import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from superposition_lc.cli import EXPERIMENTS
from superposition_lc.report import COLUMNS, FIGURES, as_html, claimed, compared, entry, figure_numbers, judged, numbers, other_settings, read_report, verdict, without_result, write_report
from superposition_lc.statistics import seed_interval

NAN = math.nan
number = st.floats(-1e6, 1e6)
positive = st.floats(0, 1e6)
ABOUT = dict(config=dict(seed=3, n_seeds=2, size=[1, 2]), versions=dict(python="3.11"), machine="Linux", device="cpu", threads=1, time="2026-01-01", seconds=90., sha256="0" * 64)


@given(number, positive, number, positive, positive)
def test_verdict_is_the_rule(published, error, ours, below, above):
    "Written out a second time: overlap, then width."
    low, high = ours - below, ours + above
    said, why = verdict(published, error, ours, low, high)
    overlap = max(low, published - 2 * error) <= min(high, published + 2 * error)
    assert said == ("differs" if not overlap else "cannot tell" if high - low >= abs(published) > 0 else "agrees")
    assert bool(why) == (said != "agrees")


@given(number, positive, number, positive)
def test_verdict_does_not_depend_on_the_unit_or_the_sign(published, error, ours, half):
    for factor in (4., -.5):
        a = verdict(published, error, ours, ours - half, ours + half)
        b = verdict(published * factor, error * abs(factor), ours * factor, *sorted([(ours - half) * factor, (ours + half) * factor]))
        assert a[0] == b[0]


@pytest.mark.parametrize("values", [(NAN, 1., 2.), (1., NAN, 2.), (1., 0., NAN)])
def test_what_is_not_known_cannot_tell(values): assert verdict(1., 0., *values)[0] == "cannot tell"


def test_a_row_makes_its_interval_from_seeds():
    r = compared("3a", "r", .9, [.8, NAN, .9, 1.], error=.02, reason="why")
    assert list(r) == COLUMNS and r["n"] == 3 and (r["ours"], r["low"], r["high"]) == pytest.approx(seed_interval([.8, .9, 1.]))
    alone, nothing, given_one = compared("", "x", 1, 2.), compared("", "x", 1, []), compared("", "x", 1, 2., interval=(1.5, 3))
    assert alone["ours"] == 2 and math.isnan(alone["low"]) and math.isnan(nothing["ours"]) and (given_one["low"], given_one["high"]) == (1.5, 3)


@pytest.mark.parametrize("holds, ours, said", [([True] * 3, (1, 1, 1), "agrees"), ([True, False], (.5, .5, .5), "differs"), ([None, None], (.5, 0, 1), "cannot tell"),
                                               ([True, None], (.75, .5, 1), "agrees"), ([False], (0, 0, 0), "differs"), ([], (NAN,) * 3, "cannot tell")], ids=str)
def test_claims(holds, ours, said):
    r = claimed("4b", "it falls", holds)
    assert (r["ours"], r["low"], r["high"]) == pytest.approx(ours, nan_ok=True) and r["n"] == len(holds) and judged([r]).verdict.item() == said


def test_intervals_over_seeds_cover():
    "A 95% interval of five normal numbers holds their mean about 19 times in 20."
    import numpy as np
    rng = np.random.default_rng(0)
    inside = [(lambda m, lo, hi: lo < 3 < hi)(*seed_interval(rng.normal(3, 2, 5))) for _ in range(2000)]
    assert .935 < sum(inside) / 2000 < .965
    assert seed_interval([1., 2., 4.], .5)[2] < seed_interval([1., 2., 4.], .95)[2]


def test_judged():
    t = judged([compared("1", "a", 1., [1., 1.], reason="never shown"), compared("1", "b", 1., [2., 2.1], reason="other units"), compared("1", "c", 1., 2.)])
    assert t.verdict.tolist() == ["agrees", "differs", "cannot tell"]
    assert t.reason.tolist() == ["", "ours is higher; other units", "ours has no interval"]
    assert set(judged([compared("1", "a", 1., [1., 1.])], "smoke").verdict) == {"cannot tell"}
    assert judged([]).empty and list(judged([])) == list(t)


def test_every_figure_of_the_paper_has_its_experiment():
    assert {name for name, _ in FIGURES.values()} <= set(EXPERIMENTS)
    assert list(FIGURES) == ["2b", "3a", "3b", "4a", "4b", "4c", "5", "6a", "6b", "7", "8", "9"]
    assert figure_numbers("figure-12ab-c.png") == ["12a", "12b"] and figure_numbers("figure-x.png") == figure_numbers("superposition.png") == []


def test_other_settings(): assert other_settings(dict(a=1, b=[1], c=2), dict(a=1, b=[2])) == dict(b=[[1], [2]], c=[2, None])


@pytest.fixture
def report(tmp_path):
    "A report of one finished, one failed and one missing experiment, with what would be markup in every text."
    folder = tmp_path / "toy_models"
    folder.mkdir()
    for name in ("figure-3a-x.png", "other.png", "table.csv"): (folder / name).write_bytes(b"x")
    rows = judged([compared("3a", "r of <b>codes</b>", .94, [.9, .95, .99], error=.02), compared("3b", "width", 5., NAN, reason="<script>alert(1)</script>"), compared("", "z", 6., [1., 1.1])])
    done = entry("toy_models", "Is it <i>so</i>?", folder, ABOUT, ABOUT["config"] | dict(size=[9]), rows, "a < b & c")
    return write_report("laptop", "0.1.0", [done, without_result("parity", "Why?", RuntimeError("<script>alert(2)</script>")), without_result("grokking", "When?")], tmp_path)


def test_written_whole_and_read_back(report, tmp_path):
    assert read_report(tmp_path) == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "toy_models"]
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and json.loads(text)["experiments"][1]["status"] == "failed"
    t = numbers(report)
    assert t.experiment.tolist() == ["toy_models"] * 3 and t.verdict.tolist() == ["agrees", "cannot tell", "differs"] and math.isnan(t.ours[1])


def test_the_page(report, tmp_path):
    page = BeautifulSoup((tmp_path / "report.html").read_text(encoding="utf-8"), "html.parser")
    assert not page.find_all("script") and not page.find_all("i") and "alert(2)" in page.get_text()
    for img in page.find_all("img"): assert (tmp_path / img["src"]).is_file() and img["alt"].strip()
    assert [img["src"] for img in page.select(".pair img")] == ["toy_models/figure-3a-x.png"] and len(page.find_all("img")) == 2
    assert {a["href"][1:] for a in page.select("td a")} == {h["id"] for h in page.find_all("h2")}
    text = page.get_text(" ")
    for said in ("agrees", "RuntimeError", "Not run", "1.5 minutes", "seeds 3, 4", "size", "a < b & c", "r of <b>codes</b>", "0.94 ± 0.02", report["rule"]): assert said in text, said
    shown = [h.get_text() for h in page.select(".pair h3")]
    assert shown == ["Figure 2b", "Figure 3a", "Figure 3b"]


def test_an_entry_without_other_settings_or_time(tmp_path):
    e = entry("toy_models", "", tmp_path, ABOUT | dict(seconds=None), ABOUT["config"], judged([]), "")
    assert "All settings are the published ones" in as_html(write_report("paper", "1", [e], tmp_path)) and e["other_settings"] == {}
    assert numbers(read_report(tmp_path)).empty


@pytest.mark.parametrize("content", [None, "", "{", "3", "{}", "\udcff"])
def test_no_report_or_a_damaged_one_is_named(tmp_path, content):
    if content is not None: (tmp_path / "report.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="report"): read_report(tmp_path)


def test_a_failed_write_keeps_the_old_report(report, tmp_path, monkeypatch):
    monkeypatch.setattr("superposition_lc.report.as_html", lambda r: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_report("laptop", "0.1.0", [], tmp_path)
    assert "RuntimeError" in (tmp_path / "report.html").read_text() and read_report(tmp_path) == report
