"""F against FVU: the curve, intervals, ratios of rates, units, flags, files, figures, bad input."""
import importlib
import json
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from superposition_lc.activations import Activations
from superposition_lc.data import planted_activations
from superposition_lc.entropy import combine_seeds
from superposition_lc.measurement import measure_activations
from superposition_lc.rate_distortion import RateCurve, RateDistortion, area_between, point_warning, rate_distortion
from superposition_lc.sae import SAEConfig

module = importlib.import_module("superposition_lc.rate_distortion")  # the package's attribute of this name is the function
SMOKE = SAEConfig.quick(expansion=4, steps=100, max_rounds=2, warmup=20, refine_steps=60)
RELU = replace(SMOKE, kind="relu")
X = planted_activations(12, 8, 500).activations
COLUMNS = "layer l1 seed n_neurons effective_features stderr df shift fvu l0 dead_fraction converged warning".split()


def traced(x=X, *args, config=SMOKE, seeds=2, **kwargs):
    return rate_distortion(x, *args, config=config, seeds=seeds, progress=False, **kwargs)


def synthetic(curves, fvu=(.01, .03, .1, .3, .6), layer="a", stderr=0., l0=1., n_neurons=10, converged=True, df=49., shift=0.):
    "A result whose seeds follow known functions F(FVU)."
    rows = [dict(layer=layer, l1=10 * f, seed=s, n_neurons=n_neurons, effective_features=F(f), stderr=stderr * F(f), df=df, shift=shift, fvu=f,
                 l0=l0(f) if callable(l0) else l0, dead_fraction=0., converged=converged) for s, F in enumerate(curves) for f in fvu]
    return RateDistortion(pd.DataFrame([r | dict(warning=point_warning(r)) for r in rows]), {})


def law(scale, slope=.25):
    return lambda f: scale * f**-slope


@pytest.fixture(scope="module")
def two():
    "Two layers of different width."
    return traced({"fc": X, "narrow": X[:, :5]}, [.2, .6, 2., 6.])


# --- the curve

points = st.lists(st.tuples(st.floats(1e-4, .99), st.floats(.5, 1e4)), min_size=2, max_size=12, unique_by=lambda p: round(math.log(p[0]), 3))


@given(st.floats(1, 1e3), st.floats(0, 2), st.lists(st.floats(1e-4, 1), min_size=2, max_size=9, unique_by=lambda f: round(math.log(f), 2)), st.floats(0, 1))
def test_a_power_law_is_read_exactly(scale, slope, fvu, where):
    curve = RateCurve(fvu, [law(scale, slope)(f) for f in fvu])
    f = math.exp(math.log(curve.low) + where * math.log(curve.high / curve.low))
    f = min(max(f, curve.low), curve.high)
    assert math.exp(curve.log(f)) == pytest.approx(law(scale, slope)(f), rel=1e-6)
    assert curve.mean_log(curve.low, curve.high) == pytest.approx(math.log(scale) - slope * math.log(curve.low * curve.high) / 2, abs=1e-6)
    assert curve.misfit < 1e-9


@given(points)
def test_the_curve_falls_and_stays_between_the_points(points):
    fvu, F = zip(*points)
    curve = RateCurve(fvu, F)
    grid = np.geomspace(curve.low, curve.high, 50)
    grid[[0, -1]] = curve.low, curve.high
    logs = np.array([curve.log(f) for f in grid])
    assert (np.diff(logs) <= 1e-9).all()
    assert math.log(min(F)) - 1e-9 <= logs.min() and logs.max() <= math.log(max(F)) + 1e-9


@given(points)
def test_points_that_fall_are_met_exactly_and_others_have_the_misfit_of_the_best_fit(points):
    fvu, F = map(np.array, zip(*points))
    falling = np.sort(F)[::-1][np.argsort(np.argsort(fvu))]
    curve = RateCurve(fvu, falling)
    assert [math.exp(curve.log(f)) for f in fvu] == pytest.approx(falling) and curve.misfit < 1e-9
    broken = RateCurve(fvu, F)
    best = max((math.log(F[j] / F[i]) / 2 for i in range(len(F)) for j in range(len(F)) if fvu[i] < fvu[j]), default=0)
    assert broken.misfit >= best - 1e-9  # no falling function comes closer to all points


@given(points, st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(points, random):
    mixed = random.sample(points, len(points))
    a, b = RateCurve(*zip(*points)), RateCurve(*zip(*mixed))
    middle = math.sqrt(a.low * a.high)
    assert a.log(middle) == pytest.approx(b.log(middle), abs=1e-12) and a.misfit == pytest.approx(b.misfit, abs=1e-12)


def test_neighbours_that_break_the_order_are_averaged_and_ties_too():
    curve = RateCurve([.1, .2, .4], [10., 14., 5.])
    assert [math.exp(curve.log(f)) for f in (.1, .15, .2, .4)] == pytest.approx([140**.5, 140**.5, 140**.5, 5])
    assert curve.misfit == pytest.approx(math.log(1.4) / 2)
    tied = RateCurve([.1, .1, .4], [8., 18., 3.])
    assert math.exp(tied.log(.1)) == pytest.approx(12) and tied.misfit == pytest.approx(math.log(1.5))
    with pytest.raises(ValueError, match="two or more values of FVU"):
        RateCurve([.1, .1], [3., 4.])


# --- F at a distortion

def test_at_is_the_geometric_mean_of_the_seeds_with_students_interval():
    r = synthetic([law(4), law(5), law(6)])
    for level in (.5, .95):
        row = r.at(.05, level).iloc[0]
        logs = np.log([4., 5., 6.]) - .25 * math.log(.05)
        reach = student.ppf((1 + level) / 2, 2) * logs.std(ddof=1) / math.sqrt(3)
        assert (row.effective_features, row.low, row.high) == pytest.approx(np.exp([logs.mean(), logs.mean() - reach, logs.mean() + reach]))
        assert row.superposition == pytest.approx(row.effective_features / 10) and row.warning == "" and row.fvu == .05


@pytest.mark.parametrize("scales", [[4.], [4., 5., 4.5]], ids=len)
def test_the_interval_is_that_of_a_measurement(scales):
    "Sampling error, its shift and seeds' error are combined as for one penalty."
    row = synthetic([law(s) for s in scales], stderr=.05, df=12., shift=.4).at(.1).iloc[0]
    F = [law(s)(.1) for s in scales]
    assert (row.effective_features, row.low, row.high) == pytest.approx(combine_seeds(F, [.05 * f for f in F], 12., shift=.4))


def test_at_is_unmoved_by_the_order_of_rows(two):
    for seed in range(3):
        mixed = RateDistortion(two.table.sample(frac=1, random_state=seed), two.settings)
        a, b = (r.at([.01, .3]).sort_values(["layer", "fvu"]).reset_index(drop=True) for r in (two, mixed))
        pd.testing.assert_frame_equal(a, b)


def test_at_several_distortions_is_at_each():
    r = synthetic([law(4), law(5)])
    pd.testing.assert_frame_equal(r.at([.05, .2]), pd.concat([r.at(.05), r.at(.2)], ignore_index=True))


@pytest.mark.parametrize("between, within", [(.05, .02), (.1, 0.), (.02, .04)])
def test_interval_at_a_distortion_covers(between, within):
    "Three seeds, 300 times: a 95% interval holds the truth in 91.5% or more (binomial: fewer has p < 1%)."
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        shared = within * rng.standard_normal()
        r = synthetic([law(20 * math.exp(shared + e)) for e in between * rng.standard_normal(3)], fvu=(.01, .1, .5), stderr=within)
        row = r.at(.05).iloc[0]
        hits += row.low <= law(20)(.05) <= row.high
    assert hits >= .915 * 300


def test_interval_of_a_ratio_covers():
    "Two layers of three seeds each, of unequal spread, 300 times."
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        a, b = (synthetic([law(20 * math.exp(e)) for e in s * rng.standard_normal(3)], fvu=(.01, .1, .5)) for s in (.1, .04))
        row = area_between(a, b).iloc[0]
        hits += row.low <= 1 <= row.high
    assert .915 * 300 <= hits


@pytest.mark.parametrize("fvu", [.009, .61, 0, -1, 1, math.nan])
def test_a_distortion_that_was_not_measured_is_refused(fvu):
    with pytest.raises(ValueError, match=r"layer 'a': fvu=.* outside the measured range, 0.01 to 0.6 "):
        synthetic([law(4), law(5)]).at(fvu)


def test_the_range_is_what_all_seeds_reach():
    a, b = synthetic([law(4)]).table, synthetic([law(4)], fvu=(.02, .5)).table.assign(seed=1)
    r = RateDistortion(pd.concat([a, b]), {})
    assert len(r.at([.02, .5])) == 2
    for f in (.0199, .501):
        with pytest.raises(ValueError, match="0.02 to 0.5"): r.at(f)


# --- the ratio of rates

def test_ratio_of_parallel_curves_is_their_distance():
    a, b = synthetic([law(8), law(8)]), synthetic([law(2), law(2)], layer="b")
    row = area_between(a, b).iloc[0]
    assert (row.ratio, row.low, row.high) == pytest.approx((4, 4, 4)) and (row.fvu_low, row.fvu_high, row.layer) == (.01, .6, "a / b")
    assert area_between(b, a).ratio[0] == pytest.approx(1 / 4)


@pytest.mark.parametrize("low, high", [(.01, .6), (.02, .2), (.1, .11)])
def test_ratio_of_crossing_curves_is_the_mean_over_log_fvu(low, high):
    a, b = synthetic([law(8, .5), law(8, .5)]), synthetic([law(2, .1), law(2, .1)])
    assert area_between(a, b, low, high).ratio[0] == pytest.approx(4 * (low * high)**(-.4 / 2))


def test_the_ratios_interval_is_welchs():
    a, b = synthetic([law(s) for s in (4, 5, 6)]), synthetic([law(s) for s in (2, 2.2)])
    la, lb = np.log([4, 5, 6]), np.log([2, 2.2])
    va, vb = la.var(ddof=1) / 3, lb.var(ddof=1) / 2
    reach = student.ppf(.95, (va + vb)**2 / (va**2 / 2 + vb**2)) * math.sqrt(va + vb)
    row = area_between(a, b, level=.9).iloc[0]
    assert (math.log(row.low), math.log(row.high)) == pytest.approx((la.mean() - lb.mean() - reach, la.mean() - lb.mean() + reach))


def test_layers_are_paired_by_name():
    a = RateDistortion(pd.concat([synthetic([law(s), law(s)], layer=n).table for n, s in (("x", 2), ("y", 3))]), {})
    b = RateDistortion(pd.concat([synthetic([law(s), law(s)], layer=n).table for n, s in (("y", 1), ("z", 3), ("x", 1))]), {})
    t = area_between(a, b)
    assert t.layer.tolist() == ["x", "y"] and t.ratio.tolist() == pytest.approx([2, 3])
    with pytest.raises(ValueError, match="no layer in common"):
        area_between(a, RateDistortion(b.table.assign(layer=b.table.layer + "2"), {}))


def test_ranges_without_overlap_and_bounds_outside_are_refused():
    a, b = synthetic([law(4)]), synthetic([law(4)], fvu=(.001, .005, .009))
    with pytest.raises(ValueError, match=r"do not overlap, 0.01 to 0.6 and 0.001 to 0.009"): area_between(a, b)
    for low, high, says in ((.3, .2, "must lie below"), (.001, .2, "outside the measured range"), (.1, .9, "outside the measured range")):
        with pytest.raises(ValueError, match=says): area_between(a, a, low, high)


def test_dense_codes_are_left_out_of_the_ratio_unless_asked_for():
    sparse, dense = synthetic([law(4)]), synthetic([law(4)], l0=lambda f: 9. if f < .05 else 2.)
    row = area_between(sparse, dense).iloc[0]
    assert row.fvu_low == .1 and row.warning == ""
    assert area_between(dense, sparse, .02).warning[0] == "dense code"
    with pytest.raises(ValueError, match="codes are dense"):
        area_between(sparse, synthetic([law(4)], l0=9.))


# --- flags

GOOD = dict(effective_features=20., fvu=.1, l0=2., n_neurons=10, converged=True)


@pytest.mark.parametrize("change, says", [
    (dict(), ""), (dict(l0=4.1), "dense code"), (dict(fvu=1.), "worse than the mean"), (dict(fvu=0.), "exact"), (dict(converged=False), "not converged"),
    (dict(effective_features=0.), "nothing fires"), (dict(effective_features=math.nan), "diverged"), (dict(l0=9., converged=False), "dense code; not converged")], ids=str)
def test_point_warnings(change, says):
    assert point_warning(GOOD | change) == says


def test_warnings_are_those_of_the_points_beside_the_distortion():
    r = synthetic([law(4), law(5)], l0=lambda f: 9. if f < .05 else 2.)
    assert r.at([.02, .05, .1, .2]).warning.tolist() == ["dense code", "dense code", "", ""]
    assert synthetic([law(4)], converged=False).at(.1).warning[0] == "not converged"
    assert synthetic([law(4, -.2)]).at(.1).warning[0] == "not monotone"


def test_points_that_say_nothing_are_not_on_the_curve():
    good = synthetic([law(4), law(5)])
    odd = [dict(GOOD, layer="a", l1=99., seed=0, stderr=0., dead_fraction=1.) | c for c in
           (dict(effective_features=0.), dict(effective_features=math.nan, fvu=math.nan), dict(fvu=1.3), dict(fvu=0.))]
    r = RateDistortion(pd.concat([good.table, pd.DataFrame([o | dict(warning=point_warning(o)) for o in odd])], ignore_index=True), {})
    pd.testing.assert_frame_equal(r.at([.01, .2]), good.at([.01, .2]))
    r.plot(), repr(r)


def test_a_seed_without_a_curve_is_named():
    t = synthetic([law(4), law(5)]).table
    t.loc[(t.seed == 1) & (t.fvu > .01), "warning"] = "nothing fires"
    with pytest.raises(ValueError, match="layer 'a', seed 1: 1 usable point.*nothing fires"):
        RateDistortion(t, {}).at(.05)


def test_gaussian_activations_are_flagged_as_dense():
    "They have no sparse code."
    gauss = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    t = traced(gauss, [.1, .3], seeds=1).table
    assert t.warning.str.contains("dense code").all()


# --- the estimator

def test_columns_and_order(two):
    assert list(two.table) == COLUMNS and two.table.layer.unique().tolist() == ["fc", "narrow"]
    assert len(two.table) == 2 * 4 * 2 and two.table.n_neurons.tolist() == [8] * 8 + [5] * 8
    for _, t in two.table.groupby(["layer", "seed"]):
        assert t.l1.tolist() == [.2, .6, 2., 6.] and t.fvu.is_monotonic_increasing and t.l0.is_monotonic_decreasing
    s = two.settings
    assert s["seeds"] == [0, 1] and s["grid"] == [.2, .6, 2., 6.] and s["retrain"] is False and s["estimator"]["expansion"] == 4 and "torch" in s["versions"]


@pytest.mark.parametrize("retrain", [False, True])
def test_the_row_of_the_configured_penalty_is_the_measurement(retrain):
    r, m = traced(X, [.1, SMOKE.l1, 3.], retrain=retrain), measure_activations(X, SMOKE, 2, progress=False)
    rows = r.table[r.table.l1 == SMOKE.l1]
    for c in ("effective_features", "stderr", "fvu", "l0", "dead_fraction"):
        assert rows[c].tolist() == pytest.approx(m.per_seed[c].tolist(), rel=1e-3), c
    assert r.settings["retrain"] is retrain


def test_same_seeds_same_table(two):
    again = traced({"fc": X, "narrow": X[:, :5]}, [6., .2, 2., .6, .6])
    pd.testing.assert_frame_equal(again.table, two.table, check_exact=True)
    other = traced(X, [.2, 2.], seeds=[7, 1])
    assert sorted({*other.table.seed}) == other.settings["seeds"] == [1, 7]


def test_the_default_grid_lies_around_the_configured_penalty():
    r = traced(seeds=1)
    assert SMOKE.l1 in r.table.l1.tolist() and r.table.l1.min() < SMOKE.l1 / 10 and r.table.l1.max() > 10 * SMOKE.l1
    assert traced(seeds=1, config=replace(SMOKE, l1=2 * SMOKE.l1)).settings["grid"] == pytest.approx([2 * v for v in r.settings["grid"]])


@pytest.mark.parametrize("unit", [1e3, 1e-3])
def test_units_change_nothing(unit, two):
    "The default estimator at smoke size."
    a, b = two.table[two.table.layer == "fc"].reset_index(drop=True), traced(unit * X, [.2, .6, 2., 6.]).table
    for c in ("effective_features", "fvu", "l0"):
        assert b[c].to_numpy() == pytest.approx(a[c].to_numpy(), rel=.02), c


def test_retrained_autoencoders_at_equal_distortion_do_not_see_units():
    "The penalty that is four times as large in units that are four times as small is the same setting."
    config = replace(RELU, scale="none", steps=800)  # trained to the end: the rate of Adam knows no units
    a, b = (traced(4**i * X, [.02 * 4**i, .08 * 4**i, .3 * 4**i], config=config).table for i in (0, 1))
    assert a.effective_features.to_numpy() != pytest.approx(traced(4 * X, [.02, .08, .3], config=config).table.effective_features.to_numpy(), rel=.05)
    assert a.fvu.to_numpy() == pytest.approx(b.fvu.to_numpy(), rel=.5) and a.effective_features.to_numpy() == pytest.approx(b.effective_features.to_numpy(), rel=.15)


def test_topk_sweeps_k():
    r = traced(X, k=[4, 1, 2], config=SAEConfig(expansion=4, kind="topk", k=1, l1=0., steps=800, max_rounds=2, warmup=20))
    assert list(r.table) == ["k" if c == "l1" else c for c in COLUMNS] and r.table.k.tolist() == [1, 1, 2, 2, 4, 4]
    assert (r.table.l0 <= r.table.k).all() and r.settings["swept"] == "k" and r.settings["retrain"]
    assert r.table.groupby("k").fvu.mean().is_monotonic_decreasing
    repr(r), r.plot()


def test_layers_alone_and_together_agree(two):
    alone = traced({"narrow": X[:, :5]}, [.2, .6, 2., 6.]).table
    together = two.table[two.table.layer == "narrow"].reset_index(drop=True)
    assert alone.effective_features.tolist() == pytest.approx(together.effective_features.tolist(), rel=1e-3)


def test_clusters_reach_the_errors():
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(100).repeat_interleave(8)
    fires = (torch.rand(100, 12, generator=g) < .1)[ids]
    x = fires * torch.rand(800, 12, generator=g) @ torch.nn.functional.normalize(torch.randn(12, 8, generator=g), dim=1)
    own, none = (traced(a, [.3, 1.], seeds=1).table for a in (Activations(x, ids), x))
    assert (own.stderr > 1.4 * none.stderr).all()


# --- bad input

@pytest.mark.parametrize("kwargs, says", [
    (dict(l1=[.1, -1.]), "l1 must be positive numbers, got -1"), (dict(l1=[0., 1.]), "l1 must be positive"), (dict(l1=[.1, math.inf]), "l1 must be positive"),
    (dict(l1=[]), "l1 must hold at least two"), (dict(l1=[.5]), "l1 must hold at least two"), (dict(l1=.5), "l1 must hold at least two"),
    (dict(l1=[.5, .5]), "l1 must hold at least two"), (dict(l1="0.1"), "l1 must be a list"), (dict(l1=["a", "b"]), "l1 must be positive"),
    (dict(l1=[.1, 1.], k=[1, 2]), "both given"), (dict(k=[1, 2]), "k is for SAEConfig.kind='topk'"), (dict(config=SAEConfig(kind="topk", k=2)), "pass k="),
    (dict(k=[1, 99], config=SAEConfig(kind="topk", k=2)), "k must not exceed the dictionary size, 64"), (dict(k=[0, 2], config=SAEConfig(kind="topk", k=2)), "k must be integers >= 1"),
    (dict(k=[1.5, 2], config=SAEConfig(kind="topk", k=2)), "k must be integers"), (dict(config=replace(RELU, l1=0.)), "SAEConfig.l1 is 0"),
    (dict(l1=[.1, 1.], config=replace(SMOKE, l1=0.)), "SAEConfig.l1 is 0"), (dict(config=RELU, retrain=False), "retrain=False needs")], ids=str)
def test_bad_arguments(kwargs, says, monkeypatch):
    monkeypatch.setattr(module, "train_sae", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=says):
        rate_distortion(X, **kwargs, progress=False)


@pytest.mark.parametrize("x, says", [
    ({}, "activations is empty"), ({"a": X, "b": X * math.nan}, "layer 'b': activations hold 4000 NaN"), (torch.ones(9, 3), "layer 'activations': activations are constant"),
    ({"a": X.half()}, "layer 'a'.*float16"), ({"a": X[None]}, "layer 'a'.*shape"), (X.tolist(), "got list"), (Activations(X, torch.arange(500) % 2), "2 cluster")], ids=range(7))
def test_bad_activations(x, says):
    with pytest.raises(ValueError, match=says):
        traced(x)


@pytest.mark.parametrize("level", [0, 1, -.5, 95])
def test_bad_level(level):
    r = synthetic([law(4)])
    with pytest.raises(ValueError, match="level"): r.at(.1, level)
    with pytest.raises(ValueError, match="level"): area_between(r, r, level=level)


# --- files and figures

def same(a, b):
    pd.testing.assert_frame_equal(a.table, b.table, check_exact=True)
    assert a.settings == b.settings and repr(a) == repr(b)


def test_files_are_exact(two, tmp_path):
    two.save(tmp_path / "new" / "r.json")
    same(RateDistortion.load(tmp_path / "new" / "r.json"), two)
    odd = RateDistortion(two.table.assign(effective_features=math.nan, fvu=math.inf, warning="diverged"), two.settings)
    odd.save(str(tmp_path / "r.json"))
    same(RateDistortion.load(str(tmp_path / "r.json")), odd)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_write_that_fails_leaves_the_old_file(two, tmp_path, monkeypatch, error):
    two.save(tmp_path / "r.json")
    def half(self, text):
        with open(self, "w") as f: f.write(text[:100])
        raise error
    monkeypatch.setattr(module.Path, "write_text", half)
    with pytest.raises(error): synthetic([law(4)]).save(tmp_path / "r.json")
    monkeypatch.undo()
    same(RateDistortion.load(tmp_path / "r.json"), two)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_file_cut_short(two, tmp_path):
    two.save(tmp_path / "r.json")
    whole = (tmp_path / "r.json").read_bytes()
    for cut in range(0, len(whole), 97):
        (tmp_path / "r.json").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="r.json is not a whole rate_distortion file"):
            RateDistortion.load(tmp_path / "r.json")


@pytest.mark.parametrize("content, says", [(b"\x89PNG", "not a whole"), (b"[]", "not written by"), (b'{"format": "superposition_lc.measurement"}', "not written by")])
def test_foreign_files(tmp_path, content, says):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=says): RateDistortion.load(tmp_path / "r.json")
    with pytest.raises(FileNotFoundError): RateDistortion.load(tmp_path / "missing.json")


@pytest.mark.parametrize("missing, wrong", [(m, None) for m in ("settings", "table", *COLUMNS)] +
                         [(m, "text") for m in ("settings", "table", *COLUMNS) if m not in ("layer", "seed", "l1", "converged")])
def test_file_with_a_part_missing_or_changed(two, tmp_path, missing, wrong):
    two.save(tmp_path / "r.json")
    d = json.loads((tmp_path / "r.json").read_text())
    part = d if missing in d else d["table"]
    if wrong is None: del part[missing]
    else: part[missing] = wrong if missing in d else [3 if missing == "warning" else wrong] * len(part[missing])
    (tmp_path / "r.json").write_text(json.dumps(d))
    with pytest.raises(ValueError, match="r.json is damaged"): RateDistortion.load(tmp_path / "r.json")


def test_plot(two):
    ax = plt.subplots()[1]
    assert two.plot(ax) is ax and two.plot() is not ax
    assert [t.get_text() for t in ax.get_legend().get_texts()][:2] == ["fc", "narrow"] and ax.get_ylim()[0] == 0 and ax.get_xscale() == "log"
    shown = {(x, y) for line in ax.lines if line.get_marker() == "o" for x, y in zip(line.get_xdata(), line.get_ydata())}
    t = two.table[two.table.fvu < 1]
    assert shown == {*zip(t.fvu, t.effective_features)}


def test_plot_marks_flagged_points_and_shows_points_without_a_curve():
    r = synthetic([law(4)], l0=lambda f: 9. if f < .05 else 2.)
    ax = r.plot()
    hollow = [line for line in ax.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert sorted(x for line in hollow for x in line.get_xdata()) == [.01, .03]
    alone = RateDistortion(r.table.iloc[2:3], {}).plot()
    assert any(len(line.get_xdata()) == 1 for line in alone.lines)


def test_repr_names_layers_and_flags(two):
    text = repr(synthetic([law(4)], l0=9.))
    assert "1 layer(s), 1 seed(s), 5 of 5 points flagged" in text and "dense code" in text
    assert "2 layer(s), 2 seed(s)" in repr(two) and "<table" in two._repr_html_()
