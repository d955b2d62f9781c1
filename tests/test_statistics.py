"""Slopes, their errors, what they add up to: planted answers, references (scipy, statsmodels), closed forms, and tables that must be refused."""
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from superposition_lc import statistics as S

LAYERS = {"relu1": 300, "relu2": 100}


@pytest.fixture(scope="module")
def table():
    "Four class counts, two widths, two layers, three seeds; slopes differ between inputs and between conditions."
    return S.planted_table(lambda n_classes, width: .6 - .1 * n_classes + .01 * width, attacked=-.3, layers=LAYERS, network_sd=.03, inputs_sd=.01)


def one(table, layer=None, **fixed):
    "Rows of one condition."
    for column, value in (dict(n_classes=2, width=8.) | fixed | ({"layer": layer} if layer else {})).items():
        table = table[table[column] == value]
    return table


# Planted answers

@pytest.mark.parametrize("unit", S.UNITS)
@pytest.mark.parametrize("inputs, extra", [("clean", 0.), ("attacked", -.3), ("pooled", -.15)])
def test_planted_slopes_come_back(unit, inputs, extra):
    "With next to no noise: exactly."
    quiet = S.planted_table(lambda n_classes, width: .6 - .1 * n_classes + .01 * width, attacked=-.3, layers=LAYERS, network_sd=1e-9, inputs_sd=1e-9)
    for s in (S.network_slopes(quiet, inputs, unit), S.slopes(quiet, inputs, unit)):
        assert np.allclose(s.normalised, .6 - .1 * s.n_classes + .01 * s.width + extra, atol=1e-6)
    assert np.allclose(s.f0, 2 * s.width) and np.allclose(s.slope, s.normalised * s.f0)


def test_layers_are_weighted_by_their_parameters():
    "Slopes of +1 with 300 parameters and -1 with 100: +1/2."
    t = pd.concat([S.planted_table(lambda *_: slope, layers={name: n}, widths=(8,), n_classes=(2,), network_sd=1e-9, inputs_sd=1e-9)
                   for name, n, slope in (("relu1", 300, 1.), ("relu2", 100, -1.))])
    assert S.network_slopes(t).normalised[0] == pytest.approx(.5)


@pytest.mark.parametrize("unit, low, high", [("observation", .12, 1), ("network", .02, .10), ("seed", .02, .10)])
def test_false_alarms_of_a_slope(unit, low, high):
    "Without an effect, p < .05 in one network's slope of twenty; too often where rows that share a network count as networks."
    t = pd.concat([S.planted_table(widths=(w,), n_classes=(2,), layers=LAYERS, seed=w) for w in range(1, 301)])
    s = S.network_slopes(t, unit=unit)
    assert low < (2 * stats.t.sf(abs(s.normalised / s.stderr), s.df) < .05).mean() < high


def test_intervals_cover_a_normalised_slope_with_a_noisy_reference():
    "A steep slope over an F(0) from two networks: without F(0)'s part in the error, coverage is far below 95%."
    t = pd.concat([S.planted_table(lambda *_: 4., widths=(w,), n_classes=(2,), seeds=2, network_sd=.05, seed=w) for w in range(1, 301)])
    s = S.network_slopes(t)
    assert ((s.low < 4) & (4 < s.high)).mean() > .91
    raw = S.slopes(t)
    assert (abs(raw.normalised - 4) < stats.t.isf(.025, raw.df) * raw.slope_stderr / raw.f0).mean() < .8


# References

def test_observations_as_units_are_the_line_everybody_fits(table):
    "scipy's linregress over all rows."
    s = S.slopes(table, unit="observation")
    for row in s.itertuples():
        part = one(table, row.layer, n_classes=row.n_classes, width=row.width)
        fit = stats.linregress(part.eps, part.effective_features)
        assert (row.slope, row.slope_stderr) == pytest.approx((fit.slope, fit.stderr)) and row.df == len(part) - 2
        assert row.f0 == pytest.approx(part[part.eps == 0].effective_features.mean())


def test_networks_as_units_are_cluster_robust_up_to_the_kind_of_error(table):
    "Clusters of equal size at one eps each: the sandwich over clusters is the sandwich over means; homoskedastic errors replace it."
    import statsmodels.api as sm
    part = one(table, "relu1")
    design = sm.add_constant(part.eps.to_numpy())
    clustered = sm.OLS(part.effective_features.to_numpy(), design).fit(
        cov_type="cluster", cov_kwds=dict(groups=(part.eps * 10 + 100 * part.seed).round().astype(int).to_numpy(), use_correction=False))
    mean = part.groupby(["eps", "seed"], as_index=False).effective_features.mean()
    on_means = sm.OLS(mean.effective_features.to_numpy(), sm.add_constant(mean.eps.to_numpy())).fit()
    row = one(S.slopes(table), "relu1").iloc[0]
    assert clustered.bse[1] == pytest.approx(on_means.HC0_se[1])
    assert (row.slope, row.slope_stderr, row.df) == pytest.approx((on_means.params[1], on_means.bse[1], 10))


def test_seeds_as_units_are_the_scatter_of_their_slopes(table):
    "Standard error of a mean of slopes, one a seed."
    part = one(table, "relu1")
    each = [stats.linregress(p.eps, p.effective_features).slope for _, p in part.groupby("seed")]
    row = one(S.slopes(table, unit="seed"), "relu1").iloc[0]
    assert (row.slope, row.slope_stderr, row.df) == pytest.approx((np.mean(each), np.std(each, ddof=1) / 3**.5, 2))


@pytest.mark.parametrize("unit", ["network", "seed"])
def test_error_of_a_quotient_to_first_order(table, unit):
    "The error of b / F(0) is that of b - r F(0) over F(0), with r and F(0) held: a linear statistic, fitted by itself."
    row, part = one(S.slopes(table, unit=unit), "relu1").iloc[0], one(table, "relu1").groupby(["eps", "seed"], as_index=False).effective_features.mean()
    c = (part.eps - part.eps.mean()) / ((part.eps - part.eps.mean())**2).sum()
    g = (c - row.normalised * (part.eps == 0) / (part.eps == 0).sum()) / row.f0
    line = np.polyval(np.polyfit(part.eps, part.effective_features, 1), part.eps)
    rest = part.effective_features - line
    if unit == "network": expected = math.sqrt((g**2).sum() * (rest**2).sum() / 10)
    else: expected = (g * rest).groupby(part.seed).sum().std() * 3**.5
    assert row.stderr == pytest.approx(expected)


def test_average_over_layers_knows_their_covariance(table):
    "It is the slope of the averaged, normalised F: fitted directly, with F(0) of each layer held."
    s = S.network_slopes(table)
    for (k, w), part in table.groupby(["n_classes", "width"]):
        share = part.n_parameters / 400
        y = part.assign(y=share * part.effective_features / part.layer.map(part[part.eps == 0].groupby("layer").effective_features.mean()))
        y = y.groupby(["eps", "seed", "inputs"]).y.sum().groupby(["eps", "seed"]).mean().reset_index()
        row = one(s, n_classes=k, width=w).iloc[0]
        assert row.normalised == pytest.approx(stats.linregress(y.eps, y.y).slope)
    shared = S.planted_table(widths=(8,), n_classes=(2,), layers={f"relu{i}": 1 for i in range(9)}, network_sd=.05, inputs_sd=1e-6)
    both, single = S.network_slopes(shared), S.slopes(shared)
    assert both.stderr[0] == pytest.approx(single.stderr.mean(), rel=1e-3)   # nine layers that move together are one
    assert S.network_slopes(shared, unit="observation").stderr[0] < both.stderr[0] / 3


def test_any_column_has_slopes(table):
    "Those of another column are those of F where F is replaced by it; a column that is not there is named."
    other = table.assign(alive_units=table.width * (1 - table.eps))
    s = S.network_slopes(other, value="alive_units")
    assert np.allclose(s.normalised, -1) and np.allclose(s.stderr, 0)
    assert np.allclose(S.slopes(other, value="alive_units").f0, S.slopes(other).width)
    with pytest.raises(ValueError, match="no column 'alive'"): S.slopes(table, value="alive")
    with pytest.raises(ValueError, match="alive_units of layer 'relu1' is 0 at eps = 0"): S.slopes(other.assign(alive_units=0), value="alive_units")


# Meta-analysis

EFFECTS = st.lists(st.tuples(st.floats(-5, 5), st.floats(.05, 3)), min_size=2, max_size=8)


@given(EFFECTS)
def test_combined_effects_agree_with_the_formulas(pairs):
    "Fixed and random effects written out; tau² never negative, I² in [0, 1), errors that never shrink."
    r, se = np.array(pairs).T
    fixed, random = S.combine_effects(r, se, "fixed"), S.combine_effects(r, se)
    w = se**-2.
    mean = (w @ r) / w.sum()
    Q = w @ (r - mean)**2
    tau2 = max(0., (Q - len(r) + 1) / (w.sum() - (w @ w) / w.sum()))
    v = 1 / (se**2 + tau2)
    assert (fixed.effect, fixed.stderr) == pytest.approx((mean, w.sum()**-.5))
    assert (random.effect, random.stderr) == pytest.approx(((v @ r) / v.sum(), v.sum()**-.5), rel=1e-6, abs=1e-9)
    assert random.Q == pytest.approx(Q, rel=1e-6, abs=1e-8) and random.tau2 == pytest.approx(tau2, rel=1e-6, abs=1e-8)
    assert random.p_Q == pytest.approx(stats.chi2.sf(Q, len(r) - 1), rel=1e-5, abs=1e-8)
    assert random.tau2 >= 0 and 0 <= random.I2 < 1 and random.stderr >= fixed.stderr * (1 - 1e-12) and fixed.tau2 == 0
    assert random.p == pytest.approx(2 * stats.norm.sf(abs(random.z))) and random.low < random.effect < random.high
    auto = S.combine_effects(r, se, "auto")
    assert auto.method == ("random" if auto.p_Q < .05 else "fixed") and auto.effect == (random if auto.p_Q < .05 else fixed).effect


def test_tau2_of_agreeing_effects_is_zero_where_statsmodels_is_negative():
    "And the result is that of one common effect, not ten times as sure."
    from statsmodels.stats.meta_analysis import combine_effects
    r, se = np.array([-.70, -.72, -.75]), np.full(3, .1)
    assert combine_effects(r, se**2, method_re="dl").tau2 < 0
    ours = S.combine_effects(r, se)
    assert ours.tau2 == 0 and ours.I2 == 0 and ours.stderr == pytest.approx(.1 / 3**.5)


def test_hartung_knapp_of_equal_errors_is_a_t_test():
    "One sample of effects against 0."
    r = [-1.2, -.7, -.1, -.3]
    assert S.combine_effects(r, [.1] * 4).p_t == pytest.approx(stats.ttest_1samp(r, 0).pvalue)


def test_one_effect_stands_for_itself():
    c = S.combine_effects([.3], [.1])
    assert (c.effect, c.stderr, c.k, c.tau2, c.Q) == (.3, .1, 1, 0., 0.) and math.isnan(c.p_Q) and "Q" not in str(c)


@pytest.mark.parametrize("effects, errors, method, message", [
    ([1., 2.], [.1, 0.], "random", "errors must be above 0"), ([1., math.nan], [.1, .1], "random", "effects hold NaN"), ([], [], "random", "lists of one length"),
    ([1., 2.], [.1], "random", "lists of one length"), ([1., 2.], [.1, .1], "bayes", "method must be"), ([1.], [-1.], "fixed", "errors must be above 0")])
def test_effects_that_cannot_be_combined(effects, errors, method, message):
    with pytest.raises(ValueError, match=message): S.combine_effects(effects, errors, method)


def test_trend_is_weighted_least_squares():
    "statsmodels with known errors, and with errors grown where the line does not hold."
    import statsmodels.api as sm
    x, r, se = np.array([1., 2., 3., 4.]), np.array([.5, .1, -.3, -.2]), np.array([.1, .3, .2, .1])
    fit = sm.WLS(r, sm.add_constant(x), se**-2)
    found = S.trend(x, r, se)
    known, scaled = fit.fit(cov_type="fixed scale"), fit.fit()
    assert found["trend"] == pytest.approx(known.params[1]) and found["chi2"] == pytest.approx(scaled.ssr)
    assert found["stderr"] == pytest.approx(max(known.bse[1], scaled.bse[1])) and scaled.bse[1] > known.bse[1]
    assert S.trend([0, 1], [0, 1], [3., 4.])["stderr"] == pytest.approx(5)
    assert S.trend([1, 2, 3, 4], [.3, .1, -.1, -.3], [.1] * 4)["stderr"] == pytest.approx(.1 / 5**.5)  # on the line: the errors stay what they are
    with pytest.raises(ValueError, match="two or more different places"): S.trend([1, 1], [0, 1], [1, 1])
    with pytest.raises(ValueError, match="above 0"): S.trend([1, 2], [0, 1], [0, 1])


# Hypotheses

def planted(base, step=0., log=0., **kwargs):
    "A table whose slopes start at `base` for 2 classes at width 8."
    return S.planted_table(lambda k, w: base + step * (S.COMPLEXITY[k] - 1) + log * math.log(w / 8), widths=(8, 16, 32), **kwargs)


@pytest.mark.parametrize("base, step, verdict", [(-1., -.1, "supported"), (-1., .8, "rejected"), (0., 0., "undecided"), (1., 0., "rejected")])
def test_universal_reduction(base, step, verdict):
    h = S.universal_reduction(planted(base, step))
    assert h.verdict == verdict and len(h.table) == 12 and h.combined.k == 12


def test_one_positive_slope_rejects_universal_reduction():
    "Eleven below 0 do not outvote it."
    t = S.planted_table(lambda k, w: 2. if (k, w) == (2, 32) else -1., widths=(8, 16, 32))
    h = S.universal_reduction(t)
    assert h.verdict == "rejected" and (h.table.p_above < .05).sum() == 1 and h.combined.effect < 0


def test_holm_by_hand():
    assert S._holm([.01, .04, .03]) == pytest.approx([.03, .06, .06])
    assert S._holm([.5, .6]) == pytest.approx([1., 1.])


@pytest.mark.parametrize("test, name", [(S.complexity, "step"), (S.capacity, "log")])
@pytest.mark.parametrize("effect", [-.5, 0., .5])
def test_trends_and_verdicts(test, name, effect):
    "Planted trends come back within their errors; the expected sign is down for complexity, up for capacity."
    h = test(planted(.3, **{name: effect}, datasets=("mnist", "fashion_mnist")))
    right = effect < 0 if test is S.complexity else effect > 0
    assert abs(h.combined.effect - effect) < 3.5 * h.combined.stderr
    assert h.verdict == ("undecided" if effect == 0 else "supported" if right else "contradicted")
    assert h.combined.k == (6 if test is S.complexity else 8) == len(h.table)


def test_capacity_is_per_e_fold():
    "From width 1 to e: the difference of the slopes."
    t = S.planted_table(lambda k, w: math.log(w), widths=(1., math.e), n_classes=(2,), network_sd=1e-4, inputs_sd=1e-5)
    assert S.capacity(t).combined.effect == pytest.approx(1, abs=.01)


def test_results_read_as_text(table):
    "Verdict, numbers, settings, what is published; flagged rows are counted."
    text = repr(S.complexity(table.assign(warning=["dense code", *[""] * (len(table) - 1)])))
    for word in ("H2", "supported", "published", "-0.745", "unit network", "1 of 384 rows are flagged", "τ²"): assert word in text


def test_groups_without_a_trend_are_named(table):
    "A width with a single class count is left out, and said to be."
    odd = pd.concat([table, S.planted_table(n_classes=(2,), widths=(64,), layers=LAYERS, architecture="mlp1")])
    h = S.complexity(odd)
    assert h.combined.k == 2 and "architecture=mlp1, width=64.0" in h.notes


def test_all_hypotheses_in_all_readings(table):
    "A row for each hypothesis, reading and kind of inputs, equal to the single calls."
    two = pd.concat([table, planted(-1., layers=LAYERS, reading="released")[lambda t: t.width != 16.]])
    summary = S.hypotheses(two)
    assert len(summary) == 18 and not summary.duplicated(["hypothesis", "reading", "inputs"]).any()
    row = summary[(summary.hypothesis == "H3") & (summary.reading == "default") & (summary.inputs == "attacked")].iloc[0]
    h = S.capacity(table, inputs="attacked")
    assert (row.effect, row.p, row.verdict, row.reason) == (h.combined.effect, h.combined.p, h.verdict, h.reason)
    assert set(S.hypotheses(table[table.n_classes == 2]).hypothesis) == {"H1", "H3"}


def test_an_undecided_h1_says_why():
    "One slope is far below 0, the other's error too large: the combined p is small, the verdict goes by both."
    t = S.planted_table(lambda k, w: -2. if w == 8 else -.01, n_classes=(2,), network_sd=.05)
    row = S.hypotheses(t, ("pooled",)).iloc[0]
    assert row.verdict == "undecided" and row.reason == "1 of 2 slopes below 0 (p < 0.05), 0 above (Holm)"


def test_datasets_in_pairs():
    "scipy's paired t-test, and Cohen's d of the differences."
    t = S.planted_table(lambda k, w: -.1 * k, datasets=("mnist",))
    f = S.planted_table(lambda k, w: -.1 * k - .5, datasets=("fashion_mnist",), seed=1)
    s = S.network_slopes(pd.concat([t, f]))
    a, b = (s[s.dataset == d].sort_values(["n_classes", "width"]).normalised.to_numpy() for d in ("fashion_mnist", "mnist"))
    found, ref = S.compare_datasets(s), stats.ttest_rel(a, b)
    assert (found["t"], found["p"], found["df"]) == pytest.approx((ref.statistic, ref.pvalue, 7))
    assert found["d"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1)) and found["difference"] == pytest.approx(-.5, abs=.1)
    with pytest.raises(ValueError, match="0 condition"): S.compare_datasets(s, "cifar10")


# Tables that are refused

def test_every_hole_is_found(table):
    "Whichever row is missing, and however many."
    for i in (0, 7, 50, 191):
        with pytest.raises(ValueError, match=r"unfinished, 1 row\(s\) are missing: \(dataset=mnist"): S.network_slopes(table.drop(i))
    with pytest.raises(ValueError, match=r"unfinished, 192 row"): S.check_table(table[table.inputs == "clean"])
    with pytest.raises(ValueError, match=r"unfinished, 24 row.*and 21 more"): S.complexity(table[~((table.n_classes == 3) & (table.seed == 1) & (table.width == 8) | (table.n_classes == 5) & (table.eps == .3) & (table.width == 8) & (table.seed < 2))])


def test_a_whole_condition_that_is_missing_is_a_hole(table):
    "Every condition that is there is complete, and yet."
    t = table[~((table.n_classes == 10) & (table.width == 8))]
    with pytest.raises(ValueError, match="n_classes=10, architecture=cnn1, width=8.0"): S.capacity(t)
    assert len(S.network_slopes(t, partial=True)) == 7


def test_partial_keeps_what_is_complete(table):
    "And its slopes are what they are in the whole table."
    t = S.network_slopes(table.drop(0), partial=True)
    pd.testing.assert_frame_equal(t, S.network_slopes(table).iloc[1:].reset_index(drop=True))
    with pytest.raises(ValueError, match="no condition of the table is complete"): S.network_slopes(one(table).drop(0), partial=True)


def test_rows_in_any_order_with_any_index(table):
    "Only the contents count."
    shuffled = table.sample(frac=1, random_state=0).set_index("eps", drop=False)
    shuffled.index.name = None
    a, b = (t.sort_values(["n_classes", "width"]).reset_index(drop=True) for t in (S.network_slopes(table), S.network_slopes(shuffled)))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.iloc[:0], "empty"), (lambda t: t.drop(columns=["seed", "eps"]), r"lacks the column\(s\) eps, seed"),
    (lambda t: t.assign(effective_features=t.effective_features.where(t.index != 3)), r"not a number >= 0 in \(dataset=mnist, n_classes=2"),
    (lambda t: t.assign(effective_features=-t.effective_features), "not a number >= 0"), (lambda t: t.assign(eps=t.eps - .1), "eps must be finite and >= 0"),
    (lambda t: t.assign(inputs="adversarial"), "'clean' or 'attacked', got"), (lambda t: t.assign(width=0.), "width must be above 0"),
    (lambda t: pd.concat([t, t.iloc[:2]]), "measured more than once"), (lambda t: t[t.eps > 0], "a slope needs eps = 0"), (lambda t: t[t.eps == 0], "a slope needs eps = 0"),
    (lambda t: t.assign(n_parameters=0), "n_parameters must be above 0"), (lambda t: t.assign(n_parameters=range(1, len(t) + 1)), "must not change with eps"),
    (lambda t: t.assign(seed=t.seed.where(t.index != 2)), "empty key"), (lambda t: t.assign(effective_features=t.effective_features * (t.eps > 0)), "is 0 at eps = 0, nothing to normalise by"),
    (lambda t: t[(t.seed == 0) & t.eps.isin([0., .1])], "2 networks: an error of the slope needs three"),
])
def test_tables_that_cannot_be_used(table, change, message):
    with pytest.raises(ValueError, match=message): S.network_slopes(change(table))


@pytest.mark.parametrize("kwargs, message", [(dict(inputs="adversarial"), "inputs must be"), (dict(unit="row"), "unit must be one of")])
def test_settings_that_do_not_exist(table, kwargs, message):
    with pytest.raises(ValueError, match=message): S.slopes(table, **kwargs)


def test_questions_that_the_table_does_not_answer(table):
    with pytest.raises(ValueError, match="unit='seed' needs two"): S.slopes(table[table.seed == 0], unit="seed")
    with pytest.raises(ValueError, match="choose one with reading="): S.capacity(pd.concat([table, table.assign(reading="released")]))
    with pytest.raises(ValueError, match="choose one with reading="): S.capacity(table, reading="native")
    with pytest.raises(ValueError, match="no trend can be fitted"): S.capacity(table[table.width == 8])
    with pytest.raises(ValueError, match="complexity is defined for 2, 3, 5, 10 classes"): S.complexity(table.assign(n_classes=table.n_classes + 1))


# The paper's numbers

def test_published_numbers_that_contradict_each_other():
    "Two of nine; the recomputed ranges hold the values that scipy gives for the printed ones."
    t = S.check_published().set_index("what")
    assert list(t.index[~t.agrees]) == ["Fashion-MNIST against MNIST: t of the difference", "H3, ResNet-18: R² from t(2)"]
    expected = {"H2: p of Q with df = 3": stats.chi2.sf(8.047, 3), "H3, ResNet-18: p of t(2)": 2 * stats.t.sf(15.7, 2), "Fashion-MNIST against MNIST: p of t(7)": 2 * stats.t.sf(2.405, 7),
                "H3, ResNet-18: R² from t(2)": .992, "Fashion-MNIST against MNIST: t of the difference": -9.404, "H3, one layer: z of the trend": 5.946}
    for what, value in expected.items(): assert t.low[what] <= value <= t.high[what]


# Figures

def test_figures_show_the_slopes(table):
    "A panel for each data set and architecture, the points at the slopes, the published values where they are known."
    both = pd.concat([table, table.assign(dataset="fashion_mnist")])
    s = S.network_slopes(table)
    for draw in (S.figure_7, S.figure_8):
        fig = draw(both)
        assert [a.get_title("left") for a in fig.axes] == ["mnist, cnn1", "fashion_mnist, cnn1"]
        labels = [t.get_text() for t in fig.legends[0].get_texts()]
        assert any(label.startswith("published trend, ") for label in labels) and not any(a.get_legend() for a in fig.axes)
    assert "published slopes" in labels and [a.get_legend_handles_labels()[1].count("published slopes") for a in fig.axes] == [1, 0]
    assert {"0.24", "0.61\n2 classes", "-0.51\n10 classes"} <= {t.get_text() for t in fig.axes[0].texts}
    ax = S.plot_capacity(s)
    drawn = {round(float(y), 6) for line in ax.get_lines() for y in np.atleast_1d(line.get_ydata())}
    assert drawn >= {round(v, 6) for v in s.normalised}


def test_ratios_are_relative_to_networks_never_attacked(table):
    "The clean line starts at 1 where clean and attacked inputs are the same; a published ratio is a star at the largest radius, or an arrow where it lies beyond ours."
    t = one(table, n_classes=2).replace({"architecture": {"cnn1": "cnn2"}})
    ax = S.plot_ratio(t, "layer")
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 4]
    assert len(lines) == 2 and all(line.get_ydata()[0] == pytest.approx(1) for line in lines)
    assert [(t.get_text(), t.xy) for t in ax.texts] == [("published 2.2", (.3, 1))] and ax.get_ylim()[1] < 2.2   # beyond ours: an arrow at the upper edge
    ax = S.plot_ratio(S.planted_table(lambda k, w: 5., architecture="cnn2", n_classes=(2,), widths=(8,), layers=dict(relu2=100)), "layer")
    star = [line for line in ax.get_lines() if line.get_marker() == "*" and len(line.get_xdata())]
    assert [(float(*s.get_xdata()), float(*s.get_ydata())) for s in star] == [(.3, 2.2)] and ax.texts[0].get_text() == "published 2.2"
    with pytest.raises(ValueError, match="the rows differ in n_classes"): S.plot_ratio(table, "layer")
    assert [a.get_title("left") for a in S.figure_9(table[table.n_classes == 2]).axes] == ["width 8", "width 32"]


def test_published_values_do_not_widen_the_axis():
    "The axis holds ours, and the published extremes and trend are there as numbers."
    t = S.planted_table(lambda k, w: -1., architecture="resnet18", n_classes=(10,), widths=(.5, 1.), layers=dict(layer4=100))
    for ax in S.figure_9(t).axes:
        low, high = ax.get_ylim()
        assert .5 < low < .7 and 1 < high < 1.4
        assert [t.get_text() for t in ax.texts] == ["published: early layers down to 0.5", "published: late layers up to 4"]
    fig = S.figure_8(t)
    assert np.ptp(fig.axes[0].get_ylim()) < 5 and "published trend, +31 per e-fold" in [t.get_text() for t in fig.legends[0].get_texts()]


def test_a_legend_says_one_thing_in_all_panels(table):
    "Where panels have other widths, in the same colours, each has its legend; what they share is said once; no panel is left empty."
    both = pd.concat([table, table.replace({"architecture": {"cnn1": "mlp1"}}).assign(width=lambda t: 2 * t.width), table.assign(dataset="fashion_mnist")])
    fig = S.figure_7(both)
    assert len(fig.axes) == 3 and [[t.get_text() for t in a.get_legend().get_texts()] for a in fig.axes] == [["width 8", "width 32"], ["width 16", "width 64"], ["width 8", "width 32"]]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["published trend, -0.745 per step"]


def test_regimes_say_what_is_sure(table):
    "A mark a condition with its slope: a square where the interval is on one side of 0, else a circle."
    s = S.network_slopes(table).assign(low=-1., high=1.)
    s.loc[0, ["normalised", "low", "high"]] = 1., .5, 1.5
    s.loc[1, ["normalised", "low", "high"]] = -.5, -.8, -.2
    ax = S.plot_regimes(s)
    assert [line.get_marker() for line in ax.get_lines()] == ["s", "s"] + ["o"] * 6
    assert [t.get_text() for t in ax.texts][:2] == ["+1.00", "-0.50"]
    red, _, blue, _ = ax.get_lines()[0].get_markerfacecolor()
    assert blue > red                              # abundance is purple, scarcity orange
    both = pd.concat([table, table.assign(dataset="fashion_mnist")])
    assert [a.get_title("left") for a in S.figure_regimes(both).axes][:2] == ["mnist, cnn1", "fashion_mnist, cnn1"]
    for draw in (S.plot_regimes, S.plot_capacity, S.plot_complexity):
        with pytest.raises(ValueError, match="the rows differ in dataset"): draw(S.network_slopes(both))


def test_effects_in_all_readings(table):
    "A point a reading and kind of inputs at its effect; the published effect where there is one."
    summary = S.hypotheses(pd.concat([table, table.assign(reading="released")]))
    for name, published in (("H1", False), ("H2", True), ("H3", True)):
        ax = S.plot_hypotheses(summary, name)
        drawn = sorted(float(x) for c in ax.containers for x in c[0].get_xdata())
        assert drawn == pytest.approx(sorted(summary[summary.hypothesis == name].effect))
        assert ("published, pooled" in [t.get_text() for t in ax.get_legend().get_texts()]) == published
    with pytest.raises(ValueError, match="has no H3, only H1, H2"): S.plot_hypotheses(summary[summary.hypothesis != "H3"], "H3")


def test_figures_of_what_a_table_lacks(table):
    with pytest.raises(ValueError, match="nothing to draw against complexity"): S.figure_7(table[table.n_classes == 2])
    with pytest.raises(ValueError, match="nothing to draw against capacity"): S.figure_8(table[table.width == 8])


# Independent of how it is written

@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(.01, 100))
def test_normalised_slopes_do_not_depend_on_the_unit_of_f(seed, factor):
    t = S.planted_table(lambda *_: .5, widths=(8,), n_classes=(2,), seed=seed)
    a, b = S.network_slopes(t), S.network_slopes(t.assign(effective_features=t.effective_features * factor))
    assert np.allclose(a[["normalised", "stderr"]], b[["normalised", "stderr"]], rtol=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_combined_effects_do_not_depend_on_order(order):
    r, se = np.array([.1, .9, -.4, .3]), np.array([.1, .2, .3, .4])
    assert S.combine_effects(r[list(order)], se[list(order)]).effect == pytest.approx(S.combine_effects(r, se).effect)
