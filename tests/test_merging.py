"""Merging split features: planted splits are merged, distinct features are kept, whatever the order and the units."""
import pytest
import torch
from hypothesis import given, strategies as st

from superposition_lc import MergedFeatures, merge_split_features, recurring_features
from superposition_lc.data import planted_activations
from superposition_lc.entropy import effective_features, feature_shares
from superposition_lc.merging import split_distance


def planted(**kwargs):
    return planted_activations(24, 24, 3000, **dict(dict(activity=.1, seed=0), **kwargs))


def F(z):
    return effective_features(feature_shares(z))


def split_proportional(z, copies, seed=0):
    "Each feature written by `copies` rows that divide its strength; groups in order."
    parts = torch.rand(z.shape[1], copies, generator=torch.Generator().manual_seed(seed)) + .1
    return (z[..., None] * (parts / parts.sum(1, keepdim=True))).flatten(1)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_split_features_are_merged_and_count_as_before(copies):
    z = planted().features
    m = merge_split_features(split_proportional(z, copies))
    assert len(m.shares) == 24 and m.effective_features == pytest.approx(F(z), rel=1e-6)
    assert m.before == pytest.approx(F(split_proportional(z, copies)), rel=1e-6) and (m.before > 1.5 * F(z)) == (copies > 1)
    assert (m.groups.view(24, copies) == m.groups.view(24, copies)[:, :1]).all() and len(m.groups.unique()) == 24


@pytest.mark.parametrize("kind", [dict(cooccurrence=.8, group=4), dict(cooccurrence=1., group=2), dict(hierarchy=.8, group=2), dict(power=1.), dict(activity=.8)], ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_distinct_correlated_features_are_kept(kind, rows):
    "Firing together, always together, in a hierarchy, at power-law rates, or nearly always on: still different features."
    p = planted(**kind)
    m = merge_split_features(p.features, p.directions if rows else None)
    assert len(m.shares) == 24 and m.effective_features == pytest.approx(m.before)


def test_split_and_correlated_at_once():
    z = planted(cooccurrence=.8, group=2).features
    assert len(merge_split_features(split_proportional(z, 3)).shares) == 24


def test_noisy_copies_are_merged():
    z = split_proportional(planted().features, 3)
    noisy = (z * (1 + .15 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))).clamp(min=0)
    m = merge_split_features(noisy)
    assert len(m.shares) == 24 and m.effective_features == pytest.approx(F(planted().features), rel=.01)


def test_copies_that_take_turns_need_rows():
    "Rows of one direction that never fire together are one feature by direction, and only by it."
    p = planted()
    turn = torch.arange(3000)[:, None] % 3 == torch.arange(3)
    z, w = (p.features[..., None] * turn[:, None]).flatten(1), p.directions.repeat_interleave(3, 0)
    assert len(merge_split_features(z).shares) == 72
    m = merge_split_features(z, 7. * w)
    assert len(m.shares) == 24 and m.effective_features == pytest.approx(F(p.features), rel=1e-6)


def test_rows_that_fire_as_one_are_one_whatever_their_directions():
    "Either is enough: proportional codes, or one direction."
    z, g = split_proportional(planted().features, 2), torch.Generator().manual_seed(5)
    assert len(merge_split_features(z, torch.randn(48, 24, generator=g)).shares) == 24
    pair = planted(cooccurrence=.9, group=2).features[:, :2]
    r = torch.corrcoef(pair.T)[0, 1].item()
    assert split_distance(pair, torch.tensor([[1., 0.], [.6, .8]]))[0, 1].item() == pytest.approx((1 - r) * .4, abs=1e-4)


def test_similar_directions_are_not_the_same():
    p = planted(directions="correlated", correlation=.6, group=4)
    assert len(merge_split_features(p.features, p.directions).shares) == 24


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1., 1e6]))
def test_order_units_and_dead_rows_do_not_matter(seed, scale):
    z = split_proportional(planted_activations(6, 6, 300, activity=.2, seed=seed % 7).features, 2, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    a, b = merge_split_features(z), merge_split_features(torch.cat([scale * z[:, order], torch.zeros(300, 3)], 1))
    assert b.effective_features == pytest.approx(a.effective_features, rel=1e-5) and (b.groups[12:] == -1).all()
    same = lambda g: g[:, None] == g
    assert torch.equal(same(a.groups)[order][:, order], same(b.groups[:12]))


@given(seed=st.integers(0, 10**6), d=st.integers(1, 8))
def test_shares_add_up_and_merging_never_adds_features(seed, d):
    z = torch.rand(50, d, generator=torch.Generator().manual_seed(seed))
    m = merge_split_features(z, threshold=.3)
    assert m.shares.sum().item() == pytest.approx(1) and 1 <= m.effective_features <= m.before + 1e-9 <= d + 1e-8
    assert sorted(m.groups.unique().tolist()) == list(range(len(m.shares)))


def test_chains_do_not_form():
    "Three rows, each close to the next: the ends are compared with their leader, not with each other's neighbours."
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4000, generator=g, dtype=torch.float64) for _ in range(2))
    z = torch.stack([a + .6 * b, 1.2 * a, a - .6 * b]).T + 20
    z[:, 1] += 1  # leads
    d = split_distance(z)
    assert d[0, 1] < .2 and d[1, 2] < .2 and d[0, 2] > .4
    assert merge_split_features(z, threshold=.8).groups.tolist() == [0, 0, 0]
    z[:, 0] += 5  # an end leads: the other end stays out
    assert merge_split_features(z, threshold=.8).groups.tolist() == [0, 0, 1]


def test_leading_dimensions_are_samples():
    z = split_proportional(planted().features, 2)
    assert merge_split_features(z.view(30, 100, -1)).effective_features == pytest.approx(merge_split_features(z).effective_features)


@pytest.mark.parametrize("args, says", [
    ((torch.zeros(5, 3),), "no feature fires"), ((torch.full((5, 3), torch.nan),), "NaN"), ((torch.rand(5, 3), torch.rand(4, 2)), r"rows must have shape \(3, neurons\)"),
    ((torch.rand(5, 3), None, 0.), "threshold"), ((torch.rand(5, 3), None, 1.5), "threshold"), ((torch.rand(5, 3), None, float("nan")), "threshold")])
def test_bad_input_is_refused(args, says):
    with pytest.raises(ValueError, match=says):
        merge_split_features(*args)


def test_it_says_what_it_did():
    z = split_proportional(planted().features, 2)
    assert isinstance(m := merge_split_features(z), MergedFeatures) and "48 rows that fire -> 24 features" in repr(m)


# --- found again

@pytest.mark.parametrize("rows", [False, True])
def test_features_are_found_again_whatever_their_order_scale_and_company(rows):
    p = planted(cooccurrence=.8, group=2)
    g = torch.Generator().manual_seed(3)
    order, n = torch.randperm(24, generator=g)[:10], 3000
    other = torch.cat([5 * p.features[:, order], torch.rand(n, 7, generator=g)], 1)
    V = (p.directions, torch.cat([3 * p.directions[order], torch.randn(7, 24, generator=g)])) if rows else ()
    assert recurring_features(p.features, other, *V).nonzero().flatten().tolist() == sorted(order.tolist())


def test_nothing_is_found_in_another_layer_or_in_silence():
    a, b = (planted(seed=s).features for s in (0, 1))
    assert not recurring_features(a, b).any() and recurring_features(a, a).all() and not recurring_features(a, 0 * a).any()
    w = torch.ones(24, 4)
    assert not recurring_features(a, 0 * a, w, w).any()  # silent rows do not match by direction


@pytest.mark.parametrize("args, says", [
    ((torch.rand(5, 3), torch.rand(4, 3)), "same samples"), ((torch.rand(5, 3), torch.rand(5)), "same samples"), ((torch.rand(5, 3), torch.rand(5, 2), torch.rand(3, 2)), "both dictionaries"),
    ((torch.rand(5, 3), torch.full((5, 2), torch.nan)), "NaN"), ((torch.rand(5, 3), torch.rand(5, 2), None, None, 2.), "threshold")])
def test_bad_pairs_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        recurring_features(*args)
