"""Crosscoders of two networks: planted features come back on the right side, controls give their known answers, what is not paired is refused."""
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from superposition_lc import SAEConfig, SparseAutoencoder
from superposition_lc.activations import Activations
from superposition_lc.experiments.crosscoder import EXCLUSIVE, _describe, crosscode, crosscode_pairs, exchange, paired, plot_norms, planted_pair
from superposition_lc.sae import energy_scale

QUICK = SAEConfig(steps=250, max_rounds=3, refine_steps=400, warmup=100)
MIXTURES = [(6, 3, 2), (8, 0, 4), (0, 6, 5), (10, 0, 0)]
SEEDS = range(2)
N, S = 8, 2000


def rotation(n, m=None, seed=0):
    "(n, m) orthonormal rows."
    return torch.linalg.qr(torch.randn(m or n, n, generator=torch.Generator().manual_seed(seed))).Q.T


@pytest.fixture(scope="module")
def pair():
    return planted_pair(6, 3, 2, N, S)


@pytest.fixture(scope="module")
def found(pair):
    "Everything that is trained, by name, in a few stacks."
    a, b = pair
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1))
    pairs = {(m, s): planted_pair(*m, N, S, seed=s) for m in MIXTURES for s in SEEDS}
    pairs |= {"swapped": (b, a), "itself": (a, a), "rotated": (a, a @ rotation(N)), "shuffled": (a, b[order]), "louder": (1e3 * a, b), "permuted": (a[order], b[order])}
    pairs |= {("strength", v): planted_pair(6, 0, 2, N, S, strength=v) for v in (.1, .4, 1.5)}
    pairs |= {("agreement", q): planted_pair(6, 0, 0, N, 4000, agreement=q) for q in (.8, .6, 0.)}
    pairs |= {"wider": (a, b @ rotation(N, 12))}
    return crosscode_pairs(pairs, QUICK, progress=False)


def row(crosscode): return crosscode.summary.iloc[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_planted_features_come_back_on_the_right_side(found, mixture, seed):
    "Shared ones counted from either network, and those of one alone: within half a feature, or a tenth."
    r, (shared, a, b) = row(found[mixture, seed]), mixture
    for name, truth in dict(shared_a=shared, shared_b=shared, only_a=a, only_b=b, effective_a=shared + a, effective_b=shared + b).items():
        assert r[name] == pytest.approx(truth, abs=max(.5, .1 * truth)), name
    assert max(r.fvu_a, r.fvu_b) < .05 and r.twinned == 0


def test_number_of_rows_is_the_number_of_features(found):
    for s in SEEDS:
        f = found[(6, 3, 2), s].features
        assert f[f.share > .01]["where"].value_counts().to_dict() == {"shared": 6, "only a": 3, "only b": 2}


def test_swapped_networks_mirror_the_result(found):
    "r becomes 1 - r, and what a has alone is what b has alone."
    r, m = (found[k].features for k in (((6, 3, 2), 0), "swapped"))
    big = [sorted(x) for x in (r.relative_norm[r.share > .01], 1 - m.relative_norm[m.share > .01])]
    assert big[0] == pytest.approx(big[1], abs=.02)
    r, m = row(found[(6, 3, 2), 0]), row(found["swapped"])
    for k in ("effective", "shared", "only"):
        assert r[f"{k}_a"] == pytest.approx(m[f"{k}_b"], abs=.2) and r[f"{k}_b"] == pytest.approx(m[f"{k}_a"], abs=.2)


@pytest.mark.parametrize("name", ["itself", "rotated"])
def test_a_network_shares_all_with_itself(found, name):
    f, r = found[name].features, row(found[name])
    assert set(f["where"]) == {"shared"} and f.relative_norm.sub(.5).abs().max() < .01
    assert r.only_a == r.only_b == 0 and r.shared_a == pytest.approx(r.shared_b, rel=.01) and r.shared_a == pytest.approx(9, abs=.9)


def test_unrelated_samples_share_nothing(found):
    "The same two networks, samples of one in another order; samples of both in the same other order change nothing."
    assert row(found["shuffled"])[["shared_a", "shared_b"]].max() < .1
    assert row(found["shuffled"])[["only_a", "only_b"]].tolist() == pytest.approx([9, 8], abs=.9)
    assert row(found["permuted"])[["shared_a", "only_a", "only_b"]].tolist() == pytest.approx([6, 3, 2], abs=.6)


def test_loudness_and_width_change_nothing(found):
    r = row(found[(6, 3, 2), 0])
    for name, tolerance in [("louder", 1e-2), ("wider", .5)]:
        for k in ("shared_a", "shared_b", "only_a", "only_b"): assert row(found[name])[k] == pytest.approx(r[k], abs=tolerance), (name, k)


@pytest.mark.parametrize("strength", [.1, .4, 1.5])
def test_relative_norm_is_the_planted_one(found, strength):
    "Weak features are not shrunk to nothing."
    f, (a, b) = found["strength", strength].features, planted_pair(6, 0, 2, N, S, strength=strength)
    x, y = 1 / energy_scale(a).item(), strength / energy_scale(b).item()
    both = f[(f.share > .01) & (f.relative_norm < .95)]
    assert len(both) == 6 and both.relative_norm.tolist() == pytest.approx([y / (x + y)] * 6, abs=.02)
    assert set(both["where"]) == ({"shared"} if y / (x + y) > EXCLUSIVE else {"only a"})


def test_partly_shared_features_are_shared_in_part(found):
    "Networks that agree in four samples of five: three rows a feature, which count as one in each network."
    r = row(found["agreement", .8])
    assert r.unmerged_a > 1.25 * r.effective_a
    for k in "ab": assert r[f"effective_{k}"] == pytest.approx(6, rel=.1) and r[f"shared_{k}"] == pytest.approx(.8 * 6, rel=.2)


def test_features_written_twice_have_twins(found):
    assert row(found["agreement", .6]).twinned > .5
    assert row(found["agreement", 0.]).twinned == 0 and row(found["agreement", 0.]).shared_a < .1


def test_a_dictionary_read_by_hand():
    "Two exclusive rows, a shared one, and one of the same direction in a: no training, exact numbers."
    sae = SparseAutoencoder(4, 5, lasso=True)
    h = 2 ** -.5
    sae.weight.data = torch.tensor([[1., 0, 0, 0], [0, 0, 1, 0], [0, h, 0, h], [0, 1, 0, 0], [0, 0, 0, 0]])
    sae.penalty.fill_(1e-9)
    z = torch.tensor([[4., 0, 0, 0, 0], [0, 4, 0, 0, 0], [0, 0, 4, 0, 0], [0, 0, 0, 4 * h, 0]])
    f, r = _describe(sae, z @ sae.weight.data, 2, EXCLUSIVE, dict(seed=0, l0=1., converged=True))
    f = f.set_index("feature")
    assert f.relative_norm.to_dict() == pytest.approx({0: 0, 1: 1, 2: .5, 3: 0}) and f["where"].to_dict() == {0: "only a", 1: "only b", 2: "shared", 3: "only a"}
    assert f.share_a.to_dict() == pytest.approx({0: 1 / (1 + 2 * h), 1: 0, 2: h / (1 + 2 * h), 3: h / (1 + 2 * h)}, abs=1e-4)
    p = torch.tensor([1, 2 * h]) / (1 + 2 * h)       # a: row 0, and rows 2 and 3, which are one direction
    F = torch.special.entr(p).sum().exp().item()
    assert r["effective_a"] == pytest.approx(F, rel=1e-4) and r["unmerged_a"] > F + .5
    assert r["shared_a"] == pytest.approx(F * h / (1 + 2 * h), rel=1e-4) and r["shared_a"] + r["only_a"] == pytest.approx(F, rel=1e-4)
    assert r["fvu_a"] < 1e-6 and r["fvu_b"] < 1e-6


def test_tables_are_consistent(found):
    for c in found.values():
        f, r = c.features, row(c)
        for k in ("share", "share_a", "share_b"): assert f[k].sum() == pytest.approx(1)
        assert f.share.is_monotonic_decreasing and f.relative_norm.between(0, 1).all() and f.twin.between(0, 1).all()
        assert ((f.relative_norm < c.bound) == (f["where"] == "only a")).all() and ((f.relative_norm > 1 - c.bound) == (f["where"] == "only b")).all()
        for k in "ab": assert r[f"effective_{k}"] == pytest.approx(r[f"shared_{k}"] + r[f"only_{k}"])


def test_a_pair_of_a_stack_is_the_pair_alone(pair, found):
    alone = crosscode(*pair, QUICK, progress=False)
    pd.testing.assert_frame_equal(alone.summary, found[(6, 3, 2), 0].summary, rtol=1e-3)


def test_seeds_are_rows(pair):
    c = crosscode(*pair, SAEConfig(steps=50, max_rounds=1, refine_steps=30, warmup=10), seeds=[3, 7], progress=False)
    assert c.summary.seed.tolist() == [3, 7] and set(c.features.seed) == {3, 7} and c.sae.stack == 2


@given(st.lists(st.tuples(*[st.floats(0, 50)] * 4), min_size=1, max_size=5))
def test_exchange_balances(rows):
    s = pd.DataFrame(rows, columns=["shared_a", "shared_b", "only_a", "only_b"]).assign(twinned=0.)
    s = s.assign(effective_a=s.shared_a + s.only_a, effective_b=s.shared_b + s.only_b)
    e = exchange(s)
    assert (e.replaced + e.lost).tolist() == pytest.approx(s.only_a.tolist()) and (e.replaced + e.new).tolist() == pytest.approx(s.only_b.tolist())
    assert (e[["new", "lost"]].min(axis=1) == 0).all() and (e[["shared", "replaced", "new", "lost"]] >= 0).all().all()


def test_plot_shows_all_of_the_code(found):
    c = found[(6, 3, 2), 0]
    ax = c.plot()
    assert sum(p.get_height() for p in ax.patches) == pytest.approx(1)
    assert plot_norms(c.features, ax=ax) is ax and len(ax.lines) == 4


@pytest.mark.parametrize("change, says", [
    (lambda a, b: (a, b[:-1]), "a holds 2000 samples and b 1999"),
    (lambda a, b: (Activations(a, torch.arange(S)), Activations(b, torch.arange(S).roll(1))), "not paired: sample 0 comes from input 0 in a, 1999 in b"),
    (lambda a, b: (a, b.log()), "layer 'b': activations hold"),
    (lambda a, b: (a * 0, b), "layer 'a': activations are constant"),
    (lambda a, b: (a.half(), b), "layer 'a': activations are torch.float16"),
    (lambda a, b: (a, b[0]), "layer 'b': activations must have shape"),
    (lambda a, b: (a, [1, 2]), "layer 'b': activations must be a torch.Tensor"),
], ids=["fewer samples", "other inputs", "nan", "silent", "half", "one sample", "list"])
def test_what_is_not_a_pair_is_refused(pair, change, says):
    for call in (paired, crosscode):
        with pytest.raises(ValueError) as e: call(*change(*pair))
        assert says in str(e.value)


def test_settings_are_checked(pair):
    for bound in (0, .5, -1, float("nan")):
        with pytest.raises(ValueError, match="bound must lie between 0 and 1/2"): crosscode(*pair, bound=bound)
    with pytest.raises(ValueError, match="pairs is empty"): crosscode_pairs({})


def test_input_stays_as_it_is(pair):
    a, b = (x.clone() for x in pair)
    x = paired(a, b)
    assert x.shape == (S, 2 * N) and a.equal(pair[0]) and b.equal(pair[1])
