"""Toy models of superposition: gradient, training, references, the table, agreement and bands, and what is refused."""
import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from superposition_lc.entropy import effective_features, feature_shares
from superposition_lc.experiments import toy_models as module
from superposition_lc.experiments.toy_models import (
    CONTROLS, PANELS, PUBLISHED, SCALES, ToyConfig, agreement, interference, plot_agreement, plot_interference, plot_stability, psi_frobenius,
    psi_reference, reading, report, run, sparsities, stability, stability_bands, summary, toy_activations, toy_gradients, train_toy_models, validate)
from superposition_lc.sae import SAEConfig, train_sae

replace = dataclasses.replace
PAPER = SAEConfig.released(expansion=8., epochs=3)
TINY = ToyConfig(n_models=5, steps=100, n_samples=300, n_seeds=2, estimators=(("released", PAPER), ("eq5", replace(PAPER, reduction="sum"))),
                 sweep_models=4, l1s=(.1, 1000.), widths=(2, 3), expansions=(1, 8))


@pytest.fixture(scope="module")
def table():
    return run(TINY, progress=False)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- sparsities

@pytest.mark.parametrize("spacing", ["linear", "log", "logit"])
def test_sparsities_rise_between_the_ends(spacing):
    S = sparsities(100, .001, .999, spacing)
    assert S.dtype == torch.float64 and len(S) == 100 and (S.diff() > 0).all()
    assert [S[0].item(), S[-1].item()] == pytest.approx([.001, .999])
    even = dict(linear=S, log=(1 - S).log(), logit=S.logit())[spacing].diff()
    assert torch.allclose(even, even[0].expand(99), atol=1e-9)


@pytest.mark.parametrize("args, says", [
    ((5, .1, 1.), "must be below 1"), ((5, -.1, .9), r"must lie in \[0, 1\)"), ((5, .1, 1.5), r"must lie in \[0, 1\)"), ((5, math.nan, .5), r"must lie in \[0, 1\)"),
    ((5, .9, .1), "low must not exceed high"), ((5, 0., .9, "logit"), "for 'logit', be above 0"), ((0,), "n must be at least 1"), ((5, .1, .9, "even"), "'linear', 'log' or 'logit'")])
def test_bad_sparsities_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        sparsities(*args)


# --- gradient and training

@given(k=st.integers(1, 4), n=st.integers(1, 6), m=st.integers(1, 9), batch=st.integers(1, 12), seed=st.integers(0, 999))
def test_gradient_is_that_of_autograd(k, n, m, batch, seed):
    "In float64, for every shape."
    W, b, f = random(k, n, m, seed=seed), .3 * random(k, m, seed=seed + 1), random(k, batch, m, seed=seed + 2).clamp(0)
    W.requires_grad_(), b.requires_grad_()
    w = .7**torch.arange(m, dtype=torch.float64)
    losses = (w * (f - (f @ W.mT @ W + b[:, None]).relu())**2).sum(-1).mean(-1)
    losses.sum().backward()
    gW, gb, found = toy_gradients(W.detach(), b.detach(), f, w)
    for ours, true in ((gW, W.grad), (gb, b.grad), (found, losses.detach())):
        assert ours.dtype == torch.float64 and torch.allclose(ours, true, rtol=1e-6, atol=1e-9)


def test_training_is_seeded_and_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    a, b, c = (train_toy_models([.1, .9], steps=20, seed=s, progress=False) for s in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0]) and torch.equal(state, torch.get_rng_state())
    assert a[0].shape == (2, 5, 20) and a[1].shape == (2, 20) and a[0].dtype == torch.float32


def test_slices_of_the_stack_do_not_touch():
    "A model is the same whatever sparsity its neighbour has."
    (a, _), (b, _) = (train_toy_models([.3, s], steps=50, progress=False) for s in (.5, .9))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_a_dense_model_keeps_the_most_important_features():
    W, _ = train_toy_models([0.], steps=1000, progress=False)
    norms = W[0].norm(dim=0)
    assert (norms[:5] > .9).all() and (norms[6:] < .3).all()
    assert psi_reference(W).item() == pytest.approx(1, abs=.15)


def test_sparse_models_are_in_superposition():
    W, _ = train_toy_models([.3, .9, .99], steps=1000, progress=False)
    psi = psi_reference(W)
    assert psi[0] < 1.5 < psi[1] < psi[2] and psi[2] > 2


def test_trained_beyond_half_the_budget_psi_moves_little():
    "The laptop budget against twice as many steps, one model for each of ten sparsities: measured, then bounded."
    S = sparsities(10, .001, .95)
    short, long = (psi_reference(train_toy_models(S, steps=n, progress=False)[0]) for n in (2000, 4000))
    assert ((short - long).abs() / long).median() < .03


@pytest.mark.parametrize("bad, says", [
    (dict(n_features=0), "n_features must be at least 1"), (dict(n_neurons=0), "n_neurons must be at least 1"), (dict(n_neurons=-3), "n_neurons"), (dict(steps=0), "steps"),
    (dict(batch_size=0), "batch_size"), (dict(lr=0.), "lr must be a positive"), (dict(lr=math.nan), "lr"), (dict(importance=-1.), "importance"), (dict(importance=math.inf), "importance")])
def test_bad_training_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        train_toy_models([.5], **bad)


@pytest.mark.parametrize("S, says", [([1.], "must be below 1: at S = 1 no feature is ever active"), ([.5, -.1], r"must lie in \[0, 1\)"), ([1.01], r"must lie in \[0, 1\)"),
                                     ([math.nan], r"must lie in \[0, 1\)"), ([], "must be a list of numbers"), (.5, "must be a list of numbers")])
def test_bad_sparsity_is_refused(S, says):
    for call in (lambda: train_toy_models(S), lambda: toy_activations(torch.ones(1, 2, 3), S)):
        with pytest.raises(ValueError, match=says):
            call()


# --- activations

def test_activations_are_mixed_features_of_the_right_sparsity():
    "With W the identity they are the features: zero with probability S, else uniform."
    x = toy_activations(torch.eye(6).expand(3, 6, 6), [0., .5, .9], 20_000)
    assert x.shape == (3, 20_000, 6) and x.min() >= 0 and x.max() <= 1
    for part, S in zip(x.double(), (0., .5, .9)):
        active = part[part > 0]
        assert (part == 0).double().mean().item() == pytest.approx(S, abs=.01)
        assert active.mean().item() == pytest.approx(.5, abs=.01) and active.std().item() == pytest.approx(12**-.5, abs=.01)
    assert (torch.corrcoef(x[1].T) - torch.eye(6)).abs().max() < .03


def test_activations_are_seeded():
    W = random(2, 3, 4).float()
    a, b, c = (toy_activations(W, [.2, .2], 50, s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(*toy_activations(W[:1].expand(2, 3, 4), [.2, .2], 50))  # features of their own for each model


@pytest.mark.parametrize("W, says", [(torch.ones(3, 2, 4), r"for each of the 2 sparsities, got shape \(3, 2, 4\)"), (torch.ones(2, 4), "for each of the 2"), (torch.ones(2, 0, 4), "none of them 0"),
                                     ([torch.ones(2, 4), torch.ones(3, 4)], r"models of one shape .*\[\(2, 4\), \(3, 4\)\]"), (torch.ones(4), "must have shape")])
def test_stacks_that_do_not_fit_are_refused(W, says):
    with pytest.raises(ValueError, match=says):
        toy_activations(W, [.1, .2])


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        toy_activations(torch.ones(1, 2, 3), [.1], 0)


# --- what the weights say

def test_reference_is_the_measure_on_column_norms():
    W = random(7, 5, 20)
    expected = [effective_features(feature_shares(w.norm(dim=0)[None])) / 5 for w in W]
    assert psi_reference(W).tolist() == pytest.approx(expected) and psi_reference(W[0]).item() == pytest.approx(expected[0])
    assert psi_reference(list(W)).equal(psi_reference(W)) and psi_reference(3.7 * W).tolist() == pytest.approx(expected)


def test_frobenius_and_interference():
    W = random(3, 5, 20)
    G = interference(W)
    assert psi_frobenius(W).tolist() == pytest.approx([np.linalg.norm(w.numpy())**2 / 5 for w in W])
    assert torch.allclose(G, G.mT) and torch.allclose(G.diagonal(dim1=-2, dim2=-1).sum(-1) / 5, psi_frobenius(W))


def test_weights_of_zeros_and_nan():
    "A model that has learned nothing has no features; a diverged one has no answer."
    W = torch.zeros(3, 5, 20)
    W[1, 2, 3] = math.nan
    W[2, 0, 0] = 1e-30
    psi = psi_reference(W)
    assert psi[0] == 0 and psi[1].isnan() and psi[2].item() == pytest.approx(1 / 5)


@pytest.mark.parametrize("f", [psi_reference, psi_frobenius, interference])
def test_unequal_shapes_are_refused(f):
    with pytest.raises(ValueError, match="models of one shape"):
        f([torch.ones(2, 4), torch.ones(2, 5)])
    with pytest.raises(ValueError, match="must have shape"):
        f(torch.ones(2, 3, 4, 5))


@pytest.mark.parametrize("spacing", ["log", "logit"])
def test_frobenius_agrees_with_the_reference_in_other_spacings(spacing):
    "Within two spreads of the published r = .99 +- .01, here with forty models."
    W, _ = train_toy_models(sparsities(40, spacing=spacing), steps=1500, progress=False)
    assert np.corrcoef(psi_reference(W), psi_frobenius(W))[0, 1] >= .97


@pytest.mark.parametrize("seed", [0, 4])
def test_frobenius_agrees_with_the_reference_at_laptop_scale(seed):
    "The experiment's page asserts it of all five seeds."
    c = SCALES["laptop"]
    W, _ = train_toy_models(sparsities(c.n_models, *c.s_range, c.spacing), c.n_features, c.n_neurons, c.importance, c.steps, c.batch_size, seed=seed, progress=False)
    assert np.corrcoef(psi_reference(W), psi_frobenius(W))[0, 1] >= .985


# --- config

@pytest.mark.parametrize("bad, says", [
    (dict(n_features=0), "n_features"), (dict(n_neurons=0), "n_neurons"), (dict(n_models=0), "n must be at least 1"), (dict(s_range=(.1, 1.)), "below 1"), (dict(s_range=(-1., .5)), "lie in"),
    (dict(spacing="odd"), "spacing"), (dict(n_samples=1), "n_samples"), (dict(n_seeds=0), "n_seeds"), (dict(estimators=()), "estimators"), (dict(importance=0.), "importance"),
    (dict(estimators=(("a", PAPER), ("a", PAPER))), "different names"), (dict(swept=("none",)), "swept"), (dict(sweep_models=-1), "sweep_models"), (dict(steps=0), "steps")], ids=str)
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        ToyConfig(**bad)


def test_scales():
    "Published settings at the paper's scale; three estimators, 40 features for 5 neurons, everywhere."
    assert list(SCALES) == ["smoke", "laptop", "paper"]
    for c in SCALES.values():
        assert [n for n, _ in c.estimators] == ["default", "released", "eq5"] and all(e.n_features(5) == 40 for _, e in c.estimators)
        e = dict(c.estimators)
        assert (e["released"].l1, e["released"].reduction, e["eq5"].l1, e["eq5"].reduction) == (.1, "mean", .1, "sum")
    paper = SCALES["paper"]
    assert (paper.n_models, paper.n_features, paper.n_neurons, paper.n_samples, paper.s_range) == (100, 20, 5, 10_000, (.001, .999))
    assert (dict(paper.estimators)["released"].epochs, dict(paper.estimators)["released"].batch_size) == (800, 128)
    assert SCALES["laptop"].n_seeds >= 5 and SCALES["laptop"].n_models == 100 and dict(SCALES["laptop"].estimators)["default"] == SAEConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.seed = 1


# --- the experiment

def test_one_row_a_seed_estimator_and_model(table):
    t = table[table.axis == ""]
    assert t[["seed", "estimator", "model"]].values.tolist() == [[s, e, k] for s in (0, 1) for e in ("released", "eq5") for k in range(5)]
    assert {"sparsity", "psi_toy", "psi_frob_toy", "psi_frob_sae", "psi_sae_weights", "psi", "l0", "fvu", "flagged", "warning", "psi_untrained", "rarity"} <= set(t)
    assert t.flagged.dtype == bool and (t.flagged == (t.warning != "")).all()
    assert t.value.isna().all() and (t.groupby("model").sparsity.nunique() == 1).all() and (t.groupby("seed").psi_toy.nunique() == 5).all()


def test_rows_are_what_the_parts_say(table):
    S = sparsities(5)
    W, _ = train_toy_models(S, steps=100, batch_size=TINY.batch_size, seed=1, progress=False)
    x = toy_activations(W, S, 300, 1 + 2**16)
    t = train_sae(x, PAPER, [1], progress=False)
    rows = table[(table.axis == "") & (table.seed == 1) & (table.estimator == "released")]
    assert rows.psi_toy.tolist() == psi_reference(W).tolist() and rows.psi_frob_toy.tolist() == psi_frobenius(W).tolist()
    assert rows.psi.tolist() == (t.table.effective_features / 5).tolist() and rows.l0.tolist() == t.table.l0.tolist()
    weights = t.sae.weight.detach().double()
    assert rows.psi_frob_sae.tolist() == pytest.approx([(w**2).sum().item() / 5 for w in weights])
    assert rows.psi_sae_weights.tolist() == pytest.approx([effective_features(feature_shares(w.norm(dim=1)[None])) / 5 for w in weights])
    assert rows.rarity.tolist() == pytest.approx((-torch.log1p(-S)).tolist())


def test_run_is_deterministic(table):
    state = torch.get_rng_state()
    pd.testing.assert_frame_equal(run(TINY, progress=False), table, check_exact=True)
    assert torch.equal(state, torch.get_rng_state())
    other = validate(replace(TINY, seed=1, n_seeds=1), progress=False)
    pd.testing.assert_frame_equal(other, table[(table.axis == "") & (table.seed == 1)].reset_index(drop=True), check_exact=True)


def test_sweep_has_a_row_for_each_setting_and_model(table):
    t = table[table.axis != ""]
    assert t.groupby(["axis", "value"], sort=False).size().to_dict() == {("l1", .1): 4, ("l1", 1000.): 4, ("width", 2.): 4, ("width", 3.): 4, ("expansion", 1.): 4, ("expansion", 8.): 4}
    assert set(t.estimator) == {"released"} and set(t.seed) == {0}
    same = [t[(t.axis == a) & (t.value == v)].psi.tolist() for a, v in (("l1", .1), ("expansion", 8.))]
    assert same[0] == pytest.approx(same[1], rel=1e-4)  # two ways to say the same setting
    assert run(replace(TINY, sweep_models=0, n_seeds=1), progress=False).axis.eq("").all()


def test_models_of_nothing_have_a_name(monkeypatch):
    "A model that never speaks is flagged and does not stop the others."
    def trained(*args, **kwargs):
        W, b = train_toy_models(*args, **kwargs)
        W[1] = 0
        return W, b
    monkeypatch.setattr(module, "train_toy_models", trained)
    t = validate(replace(TINY, n_seeds=1), progress=False)
    silent = t[t.model == 1]
    assert silent.warning.str.startswith("silent").all() and silent.flagged.all() and (silent[["psi", "psi_toy", "psi_frob_toy", "psi_sae_weights"]] == 0).all(axis=None)
    assert (t[t.model != 1].psi > 0).all()
    assert agreement(t).n.eq(5).all()


def test_where_no_model_speaks(monkeypatch):
    monkeypatch.setattr(module, "train_toy_models", lambda S, m, n, *a, **k: (torch.zeros(len(S), n, m), torch.zeros(len(S), m)))
    t = run(TINY, progress=False)
    assert t.warning.str.startswith("silent").all() and (t.psi == 0).all() and agreement(t).r.isna().all()


def test_where_nothing_fires_psi_is_zero_and_flagged():
    c = replace(TINY, n_seeds=1, estimators=(("strict", replace(PAPER, l1=1e3, lr=.1, epochs=20)),), swept=())
    t = validate(c, progress=False)
    assert (t.psi == 0).any() and (t[t.psi == 0].warning == "nothing fires").all() and t[t.psi == 0].l0.eq(0).all()


# --- agreement

def made(psi_toy, y, seed=0, estimator="a", **columns):
    "Rows as `validate` makes them, every panel alike."
    n = len(psi_toy)
    same = {p: y for p in (*PANELS, *CONTROLS)}
    return pd.DataFrame(dict(axis="", value=math.nan, seed=seed, estimator=estimator, model=range(n), psi_toy=psi_toy, flagged=False, **(same | columns)))


@given(slope=st.floats(.05, 5), shift=st.floats(-2, 2), seed=st.integers(0, 999))
def test_fit_is_that_of_scipy(slope, shift, seed):
    from scipy.stats import linregress
    g = np.random.default_rng(seed)
    x = g.uniform(1, 4, 30)
    y = slope * x + shift + g.normal(0, .3, 30)
    row, true = agreement(made(x, y)).query("panel == 'psi'").iloc[0], linregress(x, y)
    assert [row.r, row.slope, row.intercept, row.rmse] == pytest.approx([true.rvalue, true.slope, true.intercept, np.sqrt(np.mean((x - y)**2))], rel=1e-6, abs=1e-9)


def test_agreement_by_seed_and_estimator():
    x = np.linspace(1, 3, 10)
    t = pd.concat([made(x, x, 0, "a"), made(x, .5 * x, 0, "b"), made(x, x[::-1], 1, "a"), made(x, 2 * x, 1, "b")])
    a = agreement(t)
    assert a[a.panel == "psi"][["estimator", "seed", "r", "slope"]].values.tolist() == [["a", 0, pytest.approx(1), pytest.approx(1)], ["b", 0, pytest.approx(1), pytest.approx(.5)],
                                                                                      ["a", 1, pytest.approx(-1), pytest.approx(-1)], ["b", 1, pytest.approx(1), pytest.approx(2)]]
    for panel in ("psi_frob_toy", "psi_untrained", "rarity"):  # once, they do not depend on the estimator
        assert a[a.panel == panel].estimator.tolist() == ["", ""]
    s = summary(a).set_index(["panel", "estimator"])
    assert s.loc[("psi", "b")].slope == pytest.approx(1.25) and s.loc[("psi", "b")].slope_sd == pytest.approx(1.5 / 2**.5) and s.loc[("psi", "b")].seeds == 2
    assert s.published_r.dropna().to_dict() == {k: PUBLISHED[k[0]][0] for k in s.index if k[0] in PUBLISHED}
    assert list(dict.fromkeys(k[0] for k in s.index)) == [*PANELS, *CONTROLS]


def test_agreement_leaves_out_nan_and_says_so():
    x = np.linspace(1, 3, 10)
    y = np.where(np.arange(10) == 4, np.nan, x)
    row = agreement(made(x, x, psi=y)).query("panel == 'psi'").iloc[0]
    assert row.n == 9 and row.r == pytest.approx(1)
    assert agreement(made(x, np.full(10, np.nan))).r.isna().all()


def test_agreement_of_constants_is_nan():
    assert agreement(made(np.linspace(1, 3, 10), np.full(10, .3))).r.isna().all()


def test_agreement_without_rows_is_refused(table):
    with pytest.raises(ValueError, match="no rows of the validation"):
        agreement(table[table.axis != ""])


# --- bands

def sweep(y, x, axis="l1", value=.1):
    return pd.DataFrame(dict(axis=axis, value=value, estimator="a", psi_toy=x, psi=y, psi_sae_weights=y))


def test_bands_hold_r_and_shrink_with_models():
    g = np.random.default_rng(0)
    widths = []
    for n in (20, 200):
        x = g.normal(size=n)
        b = stability_bands(sweep(x + g.normal(size=n), x)).iloc[0]
        assert b.low < b.r < b.high and b.n == n
        widths.append(b.high - b.low)
    assert widths[1] < widths[0] / 2


def test_bands_cover_the_true_correlation():
    "About 95 in 100 samples of 40 normal pairs with r = .8: at least 86 of 100."
    g, hits = np.random.default_rng(1), 0
    for _ in range(100):
        x = g.normal(size=40)
        b = stability_bands(sweep(.8 * x + .6 * g.normal(size=40), x)).iloc[0]
        hits += b.low <= .8 <= b.high
    assert 86 <= hits <= 100


def test_bands_where_there_is_no_r():
    x = np.linspace(1, 3, 10)
    nothing = stability_bands(pd.concat([sweep(0 * x, x), sweep(np.nan * x, x, value=1.)]))
    assert nothing[["r", "low", "high"]].isna().all(axis=None) and nothing.n.tolist() == [10, 10, 0, 0]
    assert stability_bands(made(x, x)).empty


# --- figures and report

def title(ax):
    return ax.get_title(loc="left") + ax.get_title()


def test_plots_draw_on_the_axes_they_are_given(table):
    ax = plt.subplots(1, 3)[1]
    assert plot_interference(random(5, 20), .5, ax[0]) is ax[0] and "S = 0.5" in title(ax[0])
    assert plot_agreement(table, "psi", "eq5", ax[1]) is ax[1] and "published 0.94 ± 0.02" in title(ax[1])
    drawn = np.concatenate([c.get_offsets() for c in ax[1].collections])
    rows = table[(table.axis == "") & (table.estimator == "eq5")]
    assert sorted(map(tuple, drawn)) == sorted(zip(rows.psi_toy, rows.psi))
    assert plot_stability(stability_bands(table), "l1", ax=ax[2]) is ax[2]
    assert plot_agreement(table, "rarity") is not plot_interference(random(5, 20))


def test_bad_plots_are_refused(table):
    for call, says in [(lambda: plot_interference(random(2, 5, 20)), "one model's weights"), (lambda: plot_agreement(table, "chi"), "panel must be one of"),
                       (lambda: plot_agreement(table, "psi", "other"), "estimator must be one of"), (lambda: plot_stability(stability_bands(table), "lr"), "axis must be one of")]:
        with pytest.raises(ValueError, match=says):
            call()


def test_report(table, tmp_path):
    text = report(table, TINY, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["agreement.csv", "figure-2b.png", "figure-3a-eq5.png", "figure-3a-released.png", "figure-3b-released.png", "stability.csv"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("new/*.png")) and not plt.get_fignums()
    assert text == reading(table) and "psi(Z), estimator eq5: r = " in text and "published r: 0.94" in text and "control rarity" in text
    assert len(pd.read_csv(tmp_path / "new" / "agreement.csv")) == 3 + 2 * 3


def test_report_without_a_sweep(table, tmp_path):
    report(table[table.axis == ""], TINY, tmp_path)
    assert not list(tmp_path.glob("figure-3b*")) and (tmp_path / "figure-2b.png").exists()
