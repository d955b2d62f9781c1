"""Sparse parity: every input once, the split, gradients and training of the stack, the table, growth, slopes, figures, what is refused."""
import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from superposition_lc import cli
from superposition_lc.cells import FailedCells
from superposition_lc.experiments import parity
from superposition_lc.experiments.parity import (
    PUBLISHED_DROPOUT, PUBLISHED_SCALING, SCALES, ParityConfig, dropout, figure_4a, figure_4bc, growth, lowered, parity_gradients, parity_inputs, plot_dropout, plot_scaling,
    reading, report, run, scaling, slopes, stratified_split, train_parity)
from superposition_lc.sae import SAEConfig, train_sae

replace = dataclasses.replace
TINY = replace(SCALES["smoke"], epochs=1, n_samples=64, widths=(4, 8), scaling_seeds=2, width=8)


@pytest.fixture(scope="module")
def table():
    return run(TINY, progress=False)


# --- the task

@given(n_tasks=st.integers(1, 3), bits=st.integers(1, 3))
def test_every_input_once_with_its_parity(n_tasks, bits):
    x, y, task = parity_inputs(n_tasks, bits)
    n = n_tasks * 2**(n_tasks * bits)
    assert x.shape == (n, n_tasks * (1 + bits)) and len(x.unique(dim=0)) == n and set(x.flatten().tolist()) <= {0., 1.}
    assert (x[:, :n_tasks].sum(1) == 1).all() and (x[:, :n_tasks].argmax(1) == task).all()
    for row, label, t in list(zip(x, y, task))[::7]:
        assert label == sum(row[n_tasks + t * bits + j].item() for j in range(bits)) % 2


def test_published_size_and_balance():
    x, y, task = parity_inputs()
    assert x.shape == (12288, 15) and y.mean() == .5 and task.bincount().tolist() == [4096] * 3


@given(test=st.sampled_from([.1, .2, .5]), seed=st.integers(0, 99))
def test_split_is_stratified(test, seed):
    x, y, task = parity_inputs(2, 3)
    train = stratified_split(y, task, test, seed)
    for t in (0, 1):
        for label in (0, 1):
            part = train[(task == t) & (y == label)]
            assert (~part).sum() == round(len(part) * test)
    assert torch.equal(train, stratified_split(y, task, test, seed))


def test_split_depends_on_the_seed_and_not_on_the_order():
    _, y, task = parity_inputs(2, 3)
    assert not torch.equal(stratified_split(y, task, seed=0), stratified_split(y, task, seed=1))
    held = ~stratified_split(y, task)
    assert held.nonzero().flatten().diff().max() > 1  # not a block


@pytest.mark.parametrize("call, says", [
    (lambda: parity_inputs(0, 4), "n_tasks must be at least 1"), (lambda: parity_inputs(3, 0), "bits must be at least 1"), (lambda: parity_inputs(7, 3), "at most 20"),
    (lambda: stratified_split(torch.zeros(4), torch.zeros(4), 1.), "test must lie between 0 and 1")])
def test_bad_tasks_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- networks

def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(k=st.integers(1, 3), h=st.integers(1, 6), n=st.integers(1, 5), batch=st.integers(1, 9), seed=st.integers(0, 999), p=st.sampled_from([0., .5]))
def test_gradient_is_that_of_autograd(k, h, n, batch, seed, p):
    W, w2, b2 = (random(*s, seed=seed + i).requires_grad_() for i, s in enumerate([(k, h, n), (k, h), (k,)]))
    x, y, mask = random(k, batch, n, seed=seed + 3), (random(k, batch, seed=seed + 4) > 0).double(), (random(k, batch, h, seed=seed + 5).sigmoid() >= p).double() / (1 - p)
    logits = torch.einsum("kbh,kh->kb", (x @ W.mT).relu() * mask, w2) + b2[:, None]
    nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1).sum().backward()
    for ours, true in zip(parity_gradients(W.detach(), w2.detach(), b2.detach(), x, y, mask), (W, w2, b2)):
        assert ours.dtype == torch.float64 and torch.allclose(ours, true.grad, atol=1e-10)


def test_stack_is_one_network_trained_by_pytorch():
    "Without dropout, against nn.Linear and Adam on the same batches."
    x, y, _ = parity_inputs(2, 2)
    nets = train_parity(x, y, 5, seeds=(3, 4), epochs=2, batch_size=10, lr=1e-2, progress=False)
    g = torch.Generator().manual_seed(4)
    uniform = lambda size, fan: (torch.rand(size, generator=g) * 2 - 1) / math.sqrt(fan)
    W, w2, b2 = (t.requires_grad_() for t in (uniform((5, 7), 6), uniform((5,), 5), uniform((), 5)))
    adam = torch.optim.Adam([W, w2, b2], 1e-2)
    for _ in range(2):
        for i in torch.randperm(len(x), generator=g).split(10):
            torch.rand(len(i), 5, generator=g)  # the mask's numbers
            logits = (x[i] @ W[:, :6].T + W[:, 6]).relu() @ w2 + b2
            adam.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logits, y[i]).backward()
            adam.step()
    for ours, true in ((nets.W[1], W), (nets.w2[1], w2), (nets.b2[1], b2)):
        assert torch.allclose(ours, true, atol=1e-5)
    assert nets.accuracy(x, y)[1].item() == pytest.approx(((((x @ W[:, :6].T + W[:, 6]).relu() @ w2 + b2) > 0) == (y > 0)).double().mean().item())


def test_training_is_seeded_and_members_do_not_touch():
    x, y, _ = parity_inputs(2, 2)
    state = torch.get_rng_state()
    train = lambda rates, seeds: train_parity(x, y, 6, rates, seeds, epochs=3, batch_size=8, progress=False)
    a, b = train((0., .5), (0, 1)), train((0., .2, .5), (1,))
    assert a.rates == (0., .5, 0., .5) and a.seeds == (0, 0, 1, 1) and torch.equal(state, torch.get_rng_state())
    assert torch.allclose(a.W[2], b.W[0], atol=1e-6) and torch.allclose(a.W[3], b.W[2], atol=1e-6)
    assert not torch.allclose(a.W[0], a.W[1], atol=1e-4) and not torch.allclose(a.W[0], a.W[2], atol=1e-4)


def test_parity_is_learned():
    x, y, _ = parity_inputs(2, 2)
    nets = train_parity(x, y, 24, epochs=150, batch_size=8, lr=1e-2, progress=False)
    assert nets.accuracy(x, y).item() == 1


def test_hidden_before_and_after_the_relu():
    "Before it, a linear function of the inputs: rank at most 15, whatever the width."
    x, y, _ = parity_inputs()
    nets = train_parity(x, y, 40, epochs=1, batch_size=4096, progress=False)
    pre, post = nets.hidden(x[::5], "pre"), nets.hidden(x[::5], "post")
    assert pre.shape == (1, 2458, 40) and torch.equal(post, pre.relu()) and (pre < 0).any()
    rank = lambda a: int((torch.linalg.svdvals((a - a.mean(0)).double()) > 1e-4).sum())
    assert rank(pre[0]) <= 15 < rank(post[0])


@pytest.mark.parametrize("bad, says", [
    (dict(width=0), "width must be at least 1"), (dict(epochs=0), "epochs"), (dict(batch_size=0), "batch_size"), (dict(rates=(1.,)), "rates must be"), (dict(rates=()), "rates must be"),
    (dict(rates=(-.1,)), "rates"), (dict(rates=(math.nan,)), "rates"), (dict(seeds=()), "seeds must name")])
def test_bad_training_settings_are_refused(bad, says):
    x, y, _ = parity_inputs(1, 2)
    with pytest.raises(ValueError, match=says):
        train_parity(x, y, **(dict(width=2) | bad))


# --- the experiment

@pytest.mark.parametrize("bad, says", [
    (dict(site="hidden"), "'pre' or 'post'"), (dict(n_samples=1), "n_samples must lie in"), (dict(n_samples=12289), "2..12288"), (dict(epochs=0), "epochs"), (dict(short=0), "short"),
    (dict(scaling_seeds=0, widths=()), "nothing to do"), (dict(expansions=()), "expansions"), (dict(expansions=(0.,)), "expansions"), (dict(estimators=()), "estimators"), (dict(rates=(.5,)), "rates must hold 0")])
def test_bad_configs_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        ParityConfig(**bad)


def test_table_has_every_unit_once(table):
    units = table.groupby(["figure", "estimator", "seed", "width", "rate", "n_features", "l1", "budget"]).size()
    assert (units == 1).all() and len(table) == 2 * 2 * 2 * 9 + 2 * 2 * 2 * 2
    assert set(table.budget) == {"short", "full"} and set(table.figure) == {"scaling", "dropout"}
    F = table.effective_features
    assert ((F == 0) | ((F >= 1) & (F <= table.n_features + 1e-6))).all()


def test_same_seed_same_table(table):
    pd.testing.assert_frame_equal(run(TINY, progress=False), table)
    assert not run(replace(TINY, seed=5), progress=False).effective_features.equals(table.effective_features)


def test_full_and_short_budget_are_those_of_training(table):
    "The short budget, read off the history, is a run that stops there."
    t = table[(table.estimator == "released") & (table.figure == "scaling")]
    assert set(t[t.budget == "short"].n_steps) == {5} and set(t[t.budget == "full"].n_steps) == {10}
    again = scaling(replace(TINY, estimators=(("released", SAEConfig.released(epochs=5), (.01, .1, 1., 10.)),)), progress=False)
    short, stopped = t[t.budget == "short"].effective_features.to_numpy(), again[again.budget == "full"].effective_features.to_numpy()
    assert np.allclose(short, stopped, rtol=1e-5)


def test_merged_counts_stand_at_the_full_budget_only(table):
    full = table.budget == "full"
    assert table.merged[full].notna().all() and table.merged[~full].isna().all() and table.merged_rows[~full].isna().all()
    assert (table.merged[full] <= table.effective_features[full] * (1 + 1e-6)).all() and (table.merged_rows[full] <= table.merged[full] * (1 + 1e-6)).all()


def test_recurring_shares_stand_beside_every_dictionary_but_the_smallest(table):
    t = table[(table.figure == "scaling") & (table.budget == "full")]
    first = t.n_features == t.n_features.min()
    assert t.recurring[first].isna().all() and t.recurring[~first].between(0, 1).all() and table.recurring[table.figure == "dropout"].isna().all()


def test_nothing_fires_is_a_value_with_a_name():
    "A penalty that kills every code: F is 0, the row says so, and growth, figure and reading go on."
    config = replace(TINY, estimators=(("released", SAEConfig.released(epochs=60, lr=.1), (.1, 1e4)),), widths=(), short=30)
    t = scaling(config, progress=False)
    dead = t[(t.l1 == 1e4) & (t.budget == "full")]
    assert (dead.effective_features == 0).all() and (dead.warning == "nothing fires").all() and (dead.merged == 0).all() and (dead.recurring.dropna() == 0).all()
    g = growth(t).set_index(["l1", "budget"])
    assert g.silent[1e4, "full"] == 4 and math.isnan(g.exponent[1e4, "full"]) and g.silent[.1, "full"] == 0
    assert "nothing fires in 4 of 4 rows" in reading(t)
    figure_4a(t)


def test_parts_can_be_left_out():
    assert set(run(replace(TINY, scaling_seeds=0), progress=False).figure) == {"dropout"}
    assert set(run(replace(TINY, widths=()), progress=False).figure) == {"scaling"}


def test_a_part_can_be_run_again_without_the_others(table, tmp_path, monkeypatch):
    "Parts that fail are named, the others kept; the table is then that of a run in one go."
    calls, true = [], parity.dropout
    monkeypatch.setattr(parity, "dropout", lambda config, progress: true(config, progress) if config.widths == (4,) else 1 / 0)
    with pytest.raises(FailedCells, match="1 of 5 cells failed"):
        run(TINY, progress=False, store=tmp_path)
    monkeypatch.setattr(parity, "dropout", lambda config, progress: calls.append(config.widths) or true(config, progress))
    pd.testing.assert_frame_equal(run(TINY, progress=False, store=tmp_path), table)
    assert calls == [(8,)] and len(parity.parts(TINY)) == 5


def test_site_changes_what_is_measured():
    a, b = (dropout(replace(TINY, widths=(4,), site=s), progress=False) for s in ("pre", "post"))
    assert a.accuracy.equals(b.accuracy) and not a.effective_features.equals(b.effective_features)


# --- growth and slopes

def curve(F, seeds=(0, 1), **kwargs):
    return pd.DataFrame([dict(dict(figure="scaling", estimator="released", l1=.01, budget="full"), seed=s, n_features=D, effective_features=F(D, s), merged=math.nan, **kwargs)
                         for s in seeds for D in (32, 64, 128, 256)])


@given(a=st.floats(-1, 1.5), c=st.floats(.1, 10))
def test_growth_is_the_exponent(a, c):
    row = growth(curve(lambda D, s: c * D**a)).iloc[0]
    assert row.exponent == pytest.approx(a, abs=1e-9) and row.low == pytest.approx(a, abs=1e-6)
    assert row.published == pytest.approx(4.6 / 5)


def test_growth_has_an_interval_over_seeds():
    row = growth(curve(lambda D, s: D**(.5 + .1 * s), seeds=(0, 1, 2))).iloc[0]
    half = 4.302653 * .1 / math.sqrt(3)  # Student's t, two degrees of freedom
    assert row.exponent == pytest.approx(.6) and (row.low, row.high) == (pytest.approx(.6 - half), pytest.approx(.6 + half))
    assert math.isnan(growth(curve(lambda D, s: D, seeds=(0,))).low.iloc[0])


def test_growth_leaves_out_and_counts_silent_sizes():
    row = growth(curve(lambda D, s: D / 4 if D > 32 else 0)).iloc[0]
    assert row.exponent == pytest.approx(1) and row.silent == 2 and row.F_smallest == 0
    with pytest.raises(ValueError, match="no dictionary scaling"): growth(curve(lambda D, s: D), "merged")


def test_published_values():
    exponents = {l1: math.log2(b[1] / a[1]) / math.log2(b[0] / a[0]) for l1, (a, b) in PUBLISHED_SCALING.items()}
    assert exponents == {.01: pytest.approx(.92), .1: pytest.approx(.3), 1.: pytest.approx(.16), 10.: pytest.approx(2.2 / 3)}
    assert all(F[0] > F[1] and a[0] > a[1] for F, a in PUBLISHED_DROPOUT.values())


def fall(F, seeds=(0, 1, 2)):
    return pd.DataFrame([dict(figure="dropout", width=16, budget="full", seed=s, rate=p, effective_features=F(p, s), accuracy=1 - p / 2) for s in seeds for p in (0., .5, .9)])


def test_slopes_are_relative_with_intervals_over_seeds():
    row = slopes(fall(lambda p, s: (10 + s) * (1 - p * (.3 + .1 * s)))).iloc[0]
    assert row.slope == pytest.approx(-.4) and row.low == pytest.approx(-.4 - 4.302653 * .1 / math.sqrt(3))
    assert (row.accuracy_first, row.accuracy_last) == (1, pytest.approx(.55)) and row.published_F == (35, 16)


def test_lowered_is_paired_by_seed():
    "Seed 2 starts low and rises, although it stays below every other seed's start."
    down = lowered(fall(lambda p, s: 5. + p if s == 2 else 20. - p)).loc[16, "full"]
    assert down[.5] == pytest.approx(2 / 3) and down.seeds == 3
    with pytest.raises(ValueError, match="no dropout"): slopes(curve(lambda D, s: D))


# --- figures and report

def test_plots_draw_on_the_axes_they_are_given(table):
    ax = plt.subplots(1, 3)[1]
    assert plot_scaling(table, "ours", "short", ax=ax[0]) is ax[0] and plot_dropout(table, ax=ax[1]) is ax[1] and plot_dropout(table, "accuracy", ax=ax[2]) is ax[2]
    line = next(l for l in ax[0].lines if l.get_label() == "l1 = 0.1")
    t = table[(table.figure == "scaling") & (table.estimator == "ours") & (table.budget == "short") & (table.l1 == .1)].groupby("n_features").effective_features.mean()
    assert line.get_xdata().tolist() == t.index.tolist() and line.get_ydata().tolist() == pytest.approx(t.tolist())
    assert plot_scaling(table) is not plot_dropout(table)


def test_bad_plots_are_refused(table):
    for call, says in [(lambda: plot_scaling(table, "theirs"), "no rows of estimator 'theirs'"), (lambda: plot_dropout(table, "loss"), "column must be")]:
        with pytest.raises(ValueError, match=says):
            call()


def test_report_writes_all_or_what_there_is(table, tmp_path):
    text = report(table, TINY, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"figure-4a.png", "figure-4a-merged.png", "figure-4bc.png", "growth.csv", "slopes.csv"}
    assert "(published 0.92)" in text and "dropout 0.5 lowers F in" in text and "(published 1.00 -> 0.78)" not in text
    only = table[table.figure == "dropout"]
    report(only, TINY, tmp_path / "b")
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"figure-4bc.png", "slopes.csv"}


def test_reproduce_runs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SCALES, "smoke", replace(TINY, widths=(4,), scaling_seeds=1))
    assert cli.main(["reproduce", "parity", "--scale", "smoke", "--out", str(tmp_path / "p"), "--quiet", "--jobs", "1"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["reproduce", "parity", "--scale", "smoke", "--out", str(tmp_path / "p"), "--quiet", "--jobs", "1"]) == 0
    again = capsys.readouterr().out
    assert "Found the finished table" in again and again.split("\n", 1)[1] == first
    figure_4bc(pd.read_csv(tmp_path / "p" / "table.csv"))
