"""Grokking: network and gradient, training as plain torch does it, what a checkpoint's row holds, phases and correlations, figures, and what is refused."""
import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from superposition_lc.activations import capture
from superposition_lc.cli import reproduce
from superposition_lc.entropy import hill_number
from superposition_lc.experiments.grokking import (
    DROP, PUBLISHED, SCALES, GrokkingConfig, TwoPathMLP, correlation_summary, correlations, evaluate, figure_6b, figure_scale,
    grokking_gradients, pairs, phases, reading, report, run, summary, train_networks)
from superposition_lc.llc import local_learning_coefficient
from superposition_lc.sae import train_sae

replace = dataclasses.replace
TINY = replace(SCALES["smoke"], p=11, width=10, steps=200, checkpoints=4, llc_draws=10)


@pytest.fixture(scope="module")
def trained():
    return train_networks(TINY, progress=False)


@pytest.fixture(scope="module")
def table():
    return run(TINY, progress=False)


def network(trained, seed, checkpoint, config=TINY):
    net = TwoPathMLP(config.p, config.embed, config.width)
    net.load_state_dict({n: p[seed, checkpoint] for n, p in trained.parameters.items()})
    return net


# --- network and training

def test_every_pair_once():
    x, y = pairs(7)
    assert len({tuple(r) for r in x.tolist()}) == 49 and ((x[:, 0] + x[:, 1]) % 7).equal(y) and x.dtype == y.dtype == torch.int64


@settings(max_examples=25)
@given(k=st.integers(1, 3), p=st.integers(2, 7), embed=st.integers(1, 4), width=st.integers(1, 5), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_gradient_is_that_of_autograd(k, p, embed, width, batch, seed):
    "In float64, for every network of a stack."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nets = [TwoPathMLP(p, embed, width).double() for _ in range(k)]
        x = torch.randint(p, (k, batch, 2))
        y = torch.randint(p, (k, batch))
    w = {n: torch.stack([dict(net.named_parameters())[n].detach() for net in nets]) for n, _ in nets[0].named_parameters()}
    grads, losses = grokking_gradients(w, x, y)
    for i, net in enumerate(nets):
        loss = nn.functional.cross_entropy(net(x[i]), y[i])
        loss.backward()
        assert losses[i].item() == pytest.approx(loss.item())
        for n, q in net.named_parameters():
            assert torch.allclose(grads[n][i], q.grad, rtol=1e-6, atol=1e-10), n


def test_training_is_that_of_plain_torch(trained):
    "One seed of the stack against a module, an optimiser and a loop: same start, same pairs, same batches."
    x, y = pairs(TINY.p)
    for i, seed in enumerate((0, 1)):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randperm(121, generator=g)[:48]
        assert rows.equal(trained.train[i])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = TwoPathMLP(TINY.p, TINY.embed, TINY.width)
        adam = torch.optim.Adam(net.parameters(), TINY.lr, weight_decay=TINY.weight_decay)
        for step in range(1, 101):
            batch = rows[torch.randperm(48, generator=g)[:TINY.batch_size]]
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            adam.step()
            if step in trained.steps:
                for n, p in net.named_parameters():
                    assert torch.allclose(trained.parameters[n][i, trained.steps.index(step)], p, atol=1e-4), (step, n)


def test_a_seed_is_the_same_in_any_stack(trained):
    state = torch.get_rng_state()
    alone = train_networks(replace(TINY, seed=1, n_seeds=1), progress=False)
    assert torch.equal(state, torch.get_rng_state()) and alone.steps == trained.steps == [50, 100, 150, 200]
    for n, p in alone.parameters.items():
        assert torch.allclose(p[0], trained.parameters[n][1], atol=1e-5)


def test_weight_decay_shrinks():
    heavy, none = (train_networks(replace(TINY, weight_decay=w), progress=False).parameters["out.weight"][:, -1].norm() for w in (.05, 0.))
    assert heavy < .8 * none


# --- a checkpoint's row

def test_evaluation_is_that_of_the_network(trained):
    x, y = pairs(TINY.p)
    rows = trained.train[1]
    t, h = evaluate({n: p[1] for n, p in trained.parameters.items()}, x, y, rows)
    test = np.setdiff1d(np.arange(121), rows.numpy())
    assert h.shape == (4, 48, 10) and len(t) == 4
    for k in (0, 3):
        net = network(trained, 1, k)
        with torch.no_grad():
            logits = net(x)
        for name, part in (("train", rows.numpy()), ("test", test)):
            assert t[f"{name}_accuracy"][k] == pytest.approx((logits[part].argmax(1) == y[part]).double().mean().item())
            assert t[f"{name}_loss"][k] == pytest.approx(nn.functional.cross_entropy(logits[part], y[part]).item(), rel=1e-4)
        hidden = capture(net, x[rows], "act", progress=False)["act"].values
        assert torch.allclose(h[k], hidden, atol=1e-5)
        spectrum = np.linalg.eigvalsh(np.cov(hidden.numpy().T))
        assert t.variance[k] == pytest.approx(hidden.var(0).mean().item(), rel=1e-5)
        assert t.participation[k] == pytest.approx(spectrum.sum()**2 / (spectrum**2).sum(), rel=1e-4)
        assert t.pca_features[k] == pytest.approx(hill_number(spectrum.clip(0) / spectrum.clip(0).sum()), rel=1e-4)


def test_table(table):
    assert len(table) == 2 * 4 * 2 and list(table.estimator.unique()) == ["raw", "scaled"]
    assert not table.duplicated(["seed", "step", "estimator"]).any() and table.drop(columns=["llc_stderr"]).notna().all().all()
    shared = ["train_accuracy", "llc", "variance", "pca_features"]
    for _, t in table.groupby(["seed", "step"]):
        assert (t[shared].nunique() == 1).all()
    assert table.equals(run(TINY, progress=False))


def test_a_stopped_run_goes_on(table, tmp_path, monkeypatch):
    "What a run left behind is not computed again, and the table is that of a run without a stop."
    from superposition_lc.experiments import grokking
    true, calls = grokking.evaluate, []
    def dies_at_the_second(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return true(*args)
    monkeypatch.setattr(grokking, "evaluate", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, progress=False, store=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    pd.testing.assert_frame_equal(run(TINY, progress=False, store=tmp_path), table)
    assert len(calls) == 3


def test_features_are_those_of_an_autoencoder_of_its_own(trained, table):
    "No checkpoint's autoencoder knows of another: alone, it comes out the same; `scaled` does not see the size, `raw` does."
    x, y = pairs(TINY.p)
    _, h = evaluate({n: p[0] for n, p in trained.parameters.items()}, x, y, trained.train[0])
    raw, scaled = (e for _, e in TINY.estimators[:2])
    rows = table[(table.seed == 0) & (table.step == 150)].set_index("estimator")
    assert rows.effective_features["raw"] == pytest.approx(train_sae(h[2], raw, [0], progress=False).table.effective_features[0], rel=1e-3)
    assert rows.effective_features["scaled"] == pytest.approx(train_sae(10 * h[2], scaled, [0], progress=False).table.effective_features[0], rel=1e-3)
    assert train_sae(10 * h[2], raw, [0], progress=False).table.effective_features[0] != pytest.approx(rows.effective_features["raw"], rel=1e-3)


def test_coefficient_is_that_of_the_training_pairs_at_the_stated_setting(trained, table):
    "Of a seed that is not the first; it moves when the spring or the pairs are others."
    (x, y), rows, own = pairs(TINY.p), trained.train[1], {n: p[1] for n, p in trained.parameters.items()}
    setting = dict(lr=TINY.llc_lr, nbeta=TINY.llc_nbeta, localization=TINY.llc_localization, chains=TINY.llc_chains, draws=TINY.llc_draws, batch_size=TINY.batch_size, seed=TINY.seed)
    llc = lambda some, **other: local_learning_coefficient(TwoPathMLP(TINY.p, TINY.embed, TINY.width), x[some], y[some], own, **setting | other, progress=False).table.llc.to_numpy()
    found = table[(table.seed == 1) & (table.estimator == "raw")].llc.to_numpy()
    assert found == pytest.approx(llc(rows), rel=1e-3)
    for other in (llc(rows, localization=1.), llc(rows, nbeta=1.), llc(torch.arange(121))):
        assert abs(other / found - 1).min() > .01


# --- phases and correlations on tables made up so that the answer is known

def curve(seed=0, test=(0,) * 6 + (.6, .7) + (.95,) * 4, features=(50,) + (100,) * 7 + (80,) * 4, estimator="raw", **more):
    n = len(test)
    t = pd.DataFrame(dict(seed=seed, step=[100 * (i + 1) for i in range(n)], train_accuracy=[.5] + [1.] * (n - 1), test_accuracy=test, llc=[10.] + [40.] * (n - 5) + [30., 25., 20., 20.],
                          draw_loss=9., variance=[1.] + [12.] * (n - 1), pca_features=20., participation=10.))
    return t.assign(**more, estimator=estimator, effective_features=[float(f) for f in features])


def test_phases_of_a_known_curve():
    p = phases(curve()).iloc[0]
    assert (p.memorised, p.onset, p.generalised, p.f_memorising, p.f_after, p.ratio) == (200, 700, 900, 100, 80, .8)
    assert (p.llc_peak, p.llc_end) == (40, 20)


@pytest.mark.parametrize("test, features", [
    ((0,) * 3 + (.6,) + (.95,) * 8, (50, 100, 100, 90) + (80,) * 8),       # a long time after: it must not count as before
    ((0,) * 6 + (.6, .7, .7, .8) + (.95,) * 2, (50,) + (100,) * 5 + (95,) * 4 + (80,) * 2)])  # a long transition: it counts as neither
def test_phases_hold_their_own_checkpoints_only(test, features):
    assert phases(curve(test=test, features=features))[["f_memorising", "f_after"]].values.tolist() == [[100, 80]]


def test_a_network_that_never_generalises_is_asked_at_the_same_age():
    p = phases(curve(test=(.1,) * 12, features=[50] + [100] * 8 + [90] * 3)).iloc[0]
    assert math.isnan(p.generalised) and math.isnan(p.onset) and (p.f_memorising, p.f_after) == (100, 90)


def test_a_network_that_never_memorises_has_no_ratio():
    p = phases(curve(test=(.1,) * 12, train_accuracy=.5)).iloc[0]
    assert math.isnan(p.memorised) and math.isnan(p.ratio)


def test_summary_counts_drops():
    t = pd.concat([curve(s, features=[50] + [100] * 7 + [f] * 4) for s, f in enumerate((80, 91, 95))] + [curve(3, test=(.1,) * 12, features=[100] * 12)])
    s = summary(t).set_index("generalises")
    assert s.seeds.to_dict() == {True: 3, False: 1} and s.drops.to_dict() == {True: 2, False: 0} and DROP == .92
    assert (s.lowest[True], s.highest[True], s.ratio[False]) == pytest.approx((.8, .95, 1.))


def test_correlations_of_known_curves():
    "One early point can carry r: with it 1-ish, without it gone; NaN where a part is too short or constant."
    flat = curve(test=(.1,) * 12, features=[50] + [100, 101] * 5 + [100], llc=[10.] + [40., 40., 41., 41.] * 2 + [40., 40., 41.])
    r = correlations(flat).set_index(["quantity", "part"]).r
    assert r["F, raw", "all"] > .98 and abs(r["F, raw", "without_first"]) < .3 and r["variance", "all"] > .99
    assert math.isnan(r["variance", "without_first"]) and math.isnan(r["PCA, order 1", "all"]) and math.isnan(r["F, raw", "after"])
    both = pd.concat([curve(), curve(features=[60] * 12, estimator="scaled")])
    assert list(correlations(both).quantity.unique()) == ["F, raw", "variance", "PCA, order 1", "PCA, order 2", "F, scaled"]
    grokked = correlations(curve()).set_index(["quantity", "part"])
    assert grokked.n["F, raw", "memorising"] == 5 and grokked.n["F, raw", "after"] == 4 and grokked.generalises.all()
    assert set(correlation_summary(both).columns) == {"quantity", "generalises", "all", "without_first", "memorising", "after"}


# --- figures, reading, command

def test_figures_show_the_networks_and_the_transition(table):
    t = pd.concat([curve(0, test=(.1,) * 12, features=[100] * 12), curve(1)])
    left, middle, right = figure_6b(t).axes
    shaded = [p for p in middle.patches if p.get_alpha() == .2]
    assert len(shaded) == 1 and shaded[0].get_x() == 700 and shaded[0].get_x() + shaded[0].get_width() == 900
    levels = sorted(line.get_ydata()[0] for line in middle.lines if line.get_linestyle() == "--")
    assert levels == [155, PUBLISHED["memorising"]] and "seed 1" in left.get_legend().texts[0].get_text()
    assert not [p for p in figure_6b(t, seed=0).axes[1].patches if p.get_alpha() == .2]
    assert [a.get_title("left") for a in figure_scale(table).axes] == ["hidden variance", "F, raw", "F, scaled", "PCA features"]
    dots = [line for line in figure_scale(t).axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(d.get_xdata()) for d in dots] == [[900]]


@pytest.mark.parametrize("args, says", [(dict(seed=7), "seed must be one of"), (dict(estimator="best"), "estimator must be one of")])
def test_bad_choices_for_a_figure_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        figure_6b(curve(), **args)


def test_reading_says_who_generalised():
    t = pd.concat([curve(0, test=(.1,) * 12, features=[100] * 12), curve(1)])
    text = reading(t)
    assert "1 of 2 networks generalise: seed 1 from step 900" in text and "ratio 0.80 (0.80 to 0.80), below 0.92 in 1" in text and "r = 0.908" in text
    never = reading(t[t.seed == 0])
    assert "0 of 1 networks generalise\n" in never and ", after " in text and ", after " not in never


def test_report_and_command(tmp_path, capsys):
    found = reproduce("grokking", TINY, tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"cells", "table.csv", "run.json", "figure-6b.png", "figure-scale.png", "phases.csv", "correlations.csv"}
    assert "networks generalise" in capsys.readouterr().out
    again = reproduce("grokking", TINY, tmp_path, progress=False)
    assert "nothing is run again" in capsys.readouterr().out and report(again, TINY, tmp_path) == reading(found)


# --- settings

def test_the_default_is_the_published_setting():
    c = GrokkingConfig()
    assert (c.p, c.embed, c.width, c.train_fraction, c.steps, c.batch_size, c.lr, c.weight_decay, c.n_seeds) == (53, 12, 48, .4, 25_000, 128, .005, 2e-4, 8) and c.checkpoints >= 100
    assert (c.llc_lr, c.llc_nbeta, c.llc_localization, c.llc_draws) == (3e-3, 2., 5., 500)
    raw = dict(c.estimators)["raw"]
    assert (raw.expansion, raw.l1, raw.epochs, raw.batch_size, raw.reduction, raw.scale, raw.n_features(48)) == (4., .1, 100, 64, "mean", "none", 192)
    assert SCALES["paper"] == c


@pytest.mark.parametrize("bad, says", [
    (dict(p=1), "p must be at least 2"), (dict(width=0), "width must be at least 1"), (dict(steps=0), "steps must be at least 1"), (dict(checkpoints=0), "checkpoints"), (dict(steps=5, checkpoints=6), "must not exceed steps"),
    (dict(train_fraction=0.), "train_fraction"), (dict(train_fraction=1.), "train_fraction"), (dict(lr=0.), "lr must be a positive"), (dict(llc_lr=math.nan), "llc_lr"), (dict(llc_nbeta=-1.), "llc_nbeta"),
    (dict(weight_decay=-1.), "weight_decay"), (dict(n_seeds=0), "n_seeds"), (dict(estimators=()), "estimators must have different names"), (dict(estimators=GrokkingConfig().estimators * 2), "estimators")])
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        GrokkingConfig(**bad)
