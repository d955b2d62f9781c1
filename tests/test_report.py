"""The report: verdicts follow from the rule, what is written is whole, plain and safe to open."""
import json
import math

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from superposition_lc.cli import EXPERIMENTS
from superposition_lc.experiments import algorithmic, grokking, language, sweep
from superposition_lc.report import COLUMNS, FIGURES, as_html, claimed, compared, entry, figure_numbers, judged, numbers, other_settings, read_report, verdict, without_result, write_report
from superposition_lc.statistics import planted_table, seed_interval

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


# --- what experiments compare: tables in which the paper's numbers are planted agree with the paper

def verdicts(rows): return {r.quantity: r.verdict for r in judged(rows).itertuples()}


def test_grokking_compares_the_networks_that_generalise():
    F, accuracy = [100., *[176.] * 6, *[155.] * 4], [0.] * 7 + [.95] * 4
    llc = [48., 47, 46, 45, 44, 43, 42, 24, 23, 22, 22]
    rows = [dict(seed=s, step=k, estimator=e, train_accuracy=1., test_accuracy=accuracy[k] * (s < 3), effective_features=F[k] * (1 if s < 3 else 9) + s, llc=llc[k], variance=k, pca_features=k, participation=k)
            for s in range(4) for e in ("raw", "scaled") for k in range(11)]
    said = verdicts(grokking.comparison(pd.DataFrame(rows), grokking.SCALES["laptop"]))
    assert said.pop("r of F with the coefficient") == "differs" and set(said.values()) == {"agrees"} and len(said) == 6
    never = grokking.comparison(pd.DataFrame(rows).assign(test_accuracy=0.), grokking.SCALES["laptop"])
    assert set(verdicts(never).values()) == {"cannot tell"} and "no network generalises within 20000 steps" in never[0]["reason"]


def test_language_compares_pythia_only():
    first = dict(network="trained", alive=1., warning="")
    sites = [first | dict(part="site", seed=s, kind=kind, depth=depth, effective_features=F, dead_fraction=1 - 21_000 / 32_768, n_features=32_768)
             for s in range(2) for kind, values in language.PUBLISHED.items() for depth, F in enumerate(values, kind != "embedding")]
    curve = [first | dict(part="curve", seed=s, kind="mlp", depth=1, n_documents=n, effective_features=F) for s in range(2) for n, F in ((10, 900.), (110, 3100.), (20_000, 6200.))]
    table = pd.DataFrame(sites + curve)
    said = verdicts(language.comparison(table, language.SCALES["paper"]))
    assert set(said.values()) == {"agrees"} and len(said) == 23
    other = language.comparison(table, language.SCALES["laptop"])
    assert sum(v == "cannot tell" for v in verdicts(other).values()) == 21 and "another network: 3 layers of width 48" in other[0]["reason"]
    withheld = table.assign(effective_features=table.effective_features.where(table.kind != "residual"))
    assert verdicts(language.comparison(withheld, language.SCALES["paper"]))["MLP > residual > attention in F, mean over depth"] == "cannot tell"


def test_algorithmic_compares_programs_and_the_bound():
    def row(**k): return dict(seed=0, accuracy=1., layer="layer 0", kept_rank=3, warning="", known=8., superposition=.3) | k
    rows = [row(task=t, network="compiled", n=45, estimator=e, seed=s, effective_features=F) for t, F in algorithmic.PUBLISHED.items() for e in algorithmic.ESTIMATORS for s in range(2)]
    rows += [row(task=t, network="compressed", n=n, estimator=e, superposition=psi, effective_features=n * psi, accuracy=ok) for t in algorithmic.PUBLISHED
             for n, psi, ok in ((12, 1., 1.), (8, 1.05, 1.), (4, 3., .9)) for e in algorithmic.ESTIMATORS]
    rows += [row(task="planted", network="orthogonal", n=n, estimator=e, effective_features=8.) for n in (12, 8, 4) for e in algorithmic.ESTIMATORS]
    table = pd.DataFrame(rows)
    said = verdicts(algorithmic.comparison(table, algorithmic.SCALES["laptop"]))
    assert set(said.values()) == {"agrees"} and len(said) == 8
    solved = verdicts(algorithmic.comparison(table.assign(accuracy=1.), algorithmic.SCALES["laptop"]))  # psi of 3 counts as soon as the network solves its task
    assert [v for q, v in solved.items() if "psi" in q] == ["differs"] * 4


def test_the_sweep_compares_what_it_has():
    step = {2: 1, 3: 2, 5: 3, 10: 4}
    one = dict(layers={"relu1": 100}, widths=(8, 16, 32, 64), seeds=4, network_sd=.005, inputs_sd=.002)
    slope = lambda k, w: -.745 * (step[k] - 2) + .22 * math.log(w / 8)
    table = pd.concat([planted_table(lambda k, w: slope(k, w) - 1.467 * (d != "mnist"), datasets=(d,), reading=r, **one) for d in ("mnist", "fashion_mnist") for r in sweep.READINGS[:2]])
    table = table.assign(warning="")
    said = verdicts(sweep.comparison(table, sweep.SCALES["laptop"]))
    for what in ("H2, slope per step of complexity", "H3, slope per log width, one layer", "Fashion-MNIST less MNIST, slope", "H1, F falls everywhere, is rejected"):
        assert said[f"{what}, released"] == said[f"{what}, default"] == "agrees", what
    assert said["slope over F(0), mnist, 2 classes, cnn1 of width 8, released"] == "differs"  # planted: 0.745
    shown = {r["quantity"]: r for r in sweep.comparison(table, sweep.SCALES["laptop"])}
    assert shown["slope over F(0), mnist, 2 classes, cnn1 of width 8, released"]["ours"] == pytest.approx(.745, abs=.02)
    assert shown["F / F(0) up to, mnist, 2 classes, cnn2, relu2, released"]["reason"] == "not in this sweep"
