"""Shares, Hill numbers and the streaming estimate: properties, references, bad input, and coverage of the interval."""
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import logsumexp
from scipy.stats import entropy, t as student

from superposition_lc.entropy import (
    Estimate, ShareAccumulator, code_sums, combine_seeds, effective_features, error_parts, estimate_columns, feature_shares, half_width, hill_number,
    _jackknife, _shift)

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")

ORDERS = [0, .3, .95, 1 - 1e-9, 1 - 1e-15, 1, 1 + 2.3e-16, 1 + 1e-9, 1.05, 1.5, 2, 10, 1e3, 1e300, math.inf]
orders = st.one_of(st.sampled_from(ORDERS), st.floats(0, 50))
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
codes = arrays(np.float64, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=numbers).filter(lambda z: z.any())


@st.composite
def shares(draw, most=40):
    "Shares over up to 14 orders of magnitude, some of them zero."
    logs = draw(arrays(np.float64, st.integers(1, most), elements=st.floats(-14, 0)))
    p = 10**logs * draw(arrays(np.bool_, len(logs)))
    assume(p.any())
    return torch.tensor(p / p.sum())


@st.composite
def streams(draw):
    "Codes (S, D) and cluster ids (S,), with at least three active groups."
    S, D, rng = draw(st.integers(8, 60)), draw(st.integers(1, 8)), np.random.default_rng(draw(st.integers(0, 2**31)))
    z = rng.gamma(.5, size=(S, D)) * (rng.random((S, D)) < .7) + .01
    return torch.tensor(z), torch.tensor(np.r_[:8, rng.integers(0, draw(st.integers(8, 200)), S - 8)])


def close(a: Estimate, b: Estimate, rel=1e-9):
    "Equal counts, equal numbers but for rounding."
    assert (a.n_samples, a.n_clusters) == (b.n_samples, b.n_clusters)
    assert a.plug_in == pytest.approx(b.plug_in, rel=1e-12)
    for name in ("value", "low", "high"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=rel)
    assert a.stderr == pytest.approx(b.stderr, rel=1e-6, abs=1e-9)


# Shares

@given(codes, st.integers(1, 4), st.sampled_from([np.float64, np.float32, np.int32]))
def test_sums_are_those_of_each_group(z, n_groups, dtype):
    z = z.astype(dtype)
    flat = z.reshape(-1, z.shape[-1])
    where = np.arange(len(flat)) % n_groups
    expected = [np.abs(flat[where == g].astype(np.float64)).sum(0) for g in range(n_groups)]
    np.testing.assert_allclose(code_sums(torch.tensor(z), torch.tensor(where), n_groups), expected, rtol=1e-12)


@given(codes)
def test_shares_are_shares_of_the_budget(z):
    p = feature_shares(z)
    assert p.dtype == torch.float64 and p.shape == z.shape[-1:] and (p >= 0).all()
    assert p.sum().item() == pytest.approx(1, rel=1e-12)
    budget = [math.fsum(abs(column)) for column in z.reshape(-1, z.shape[-1]).T]
    np.testing.assert_allclose(p, np.array(budget) / math.fsum(budget), rtol=1e-12)


@given(codes, st.sampled_from([2.**-40, 3., 1e5]))
def test_scale_and_sign_change_no_share(z, scale):
    np.testing.assert_allclose(feature_shares(-z * scale), feature_shares(z), rtol=1e-12)


@given(codes, st.randoms(use_true_random=False))
def test_order_of_samples_and_features(z, random):
    flat, columns = z.reshape(-1, z.shape[-1]), list(range(z.shape[-1]))
    rows = list(range(len(flat)))
    random.shuffle(rows), random.shuffle(columns)
    np.testing.assert_allclose(feature_shares(flat[rows][:, columns]), feature_shares(z)[columns], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int64])
def test_every_real_dtype(dtype):
    z = torch.tensor([[1, 2, 0], [3, 100, 4]]).repeat(30_000, 1).to(dtype)
    expected = z.double().sum(0) / z.double().sum()
    torch.testing.assert_close(feature_shares(z), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ShareAccumulator(3).update(z).shares, expected, rtol=1e-12, atol=0)


def test_smallest_integer_does_not_overflow():
    torch.testing.assert_close(feature_shares(torch.tensor([[-128, 64]], dtype=torch.int8)), torch.tensor([2 / 3, 1 / 3]).double())


def test_inputs_are_left_alone_and_need_no_grad():
    z = torch.tensor([[-1., 2.]], dtype=torch.float64, requires_grad=True)
    assert not feature_shares(z).requires_grad
    acc = ShareAccumulator(2).update(z)
    assert not acc.shares.requires_grad and z.tolist() == [[-1., 2.]]
    frozen = np.array([[1., 3.]])
    frozen.flags.writeable = False
    assert feature_shares(frozen).tolist() == [.25, .75] and feature_shares([[1, 3]]).tolist() == [.25, .75]


def test_extreme_magnitudes():
    assert feature_shares(torch.tensor([[1e308, 1e308, 1e308]], dtype=torch.float64)).tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)
    assert feature_shares(torch.tensor([[5e-324, 1.5e-323]], dtype=torch.float64)).tolist() == pytest.approx([.25, .75], rel=1e-12)
    with pytest.raises(ValueError, match="overflow float64"):
        feature_shares(torch.full((3, 2), 1.5e308, dtype=torch.float64))


@pytest.mark.parametrize("bad, message", [
    (torch.tensor([[1., 2.], [float("nan"), float("inf")]]), r"2 NaN or infinite values, the first at index \(1, 0\).*drop"),
    (torch.tensor([[[1., -float("inf")]]]), r"index \(0, 0, 1\)"),
    (torch.zeros(0, 3), "empty"), (torch.zeros(3, 0), "empty"), (torch.zeros(2, 3), "no feature fires.*l1"),
    (torch.tensor(3.), "shape"), (torch.ones(2, 2, dtype=torch.bool), "bool"), (torch.ones(2, 2, dtype=torch.complex64), "complex")])
def test_bad_codes_are_refused_with_the_fix(bad, message):
    with pytest.raises(ValueError, match=message):
        feature_shares(bad)


# Hill numbers

@given(shares())
def test_against_scipy_and_the_formula(p):
    q = p.numpy()[p.numpy() > 0]
    assert effective_features(p) == pytest.approx(np.exp(entropy(p.numpy())), rel=1e-12)
    assert hill_number(p, 0) == len(q)
    assert hill_number(p, 2) == pytest.approx(1 / math.fsum(q**2), rel=1e-12)
    assert hill_number(p, .5) == pytest.approx(math.fsum(q**.5)**2, rel=1e-12)
    assert hill_number(p, 200) == pytest.approx(np.exp(logsumexp(200 * np.log(q)) / -199), rel=1e-12)
    assert hill_number(p, math.inf) == pytest.approx(1 / q.max(), rel=1e-12)


@pytest.mark.parametrize("order", [.9, .99, 1 - 1e-6, 1 - 1e-12, 1 - 1e-15, 1, 1 + 1e-15, 1 + 1e-9, 1.0001, 1.0999, 1.1001, 3])
def test_against_sixty_digits(order):
    p = feature_shares(np.random.default_rng(0).gamma(.1, size=(1, 300)) + 1e-300)
    with localcontext() as context:
        context.prec = 60
        exact = [Decimal(x) for x in p.tolist()]
        exact = [x / sum(exact) for x in exact]
        q = Decimal(order)
        log_f = -sum(x * x.ln() for x in exact) if q == 1 else sum((q * x.ln()).exp() for x in exact).ln() / (1 - q)
        expected = float(log_f.exp())
    assert hill_number(p, order) == pytest.approx(expected, rel=1e-12)


@given(shares(), orders)
def test_bounds_hold_exactly(p, order):
    assert 1 <= hill_number(p, order) <= int((p > 0).sum()) <= len(p)


@given(shares(), orders, orders)
def test_higher_orders_count_less(p, a, b):
    assert hill_number(p, min(a, b)) >= hill_number(p, max(a, b)) * (1 - 1e-12)


@given(shares(), orders, st.randoms(use_true_random=False))
def test_permutation_and_silent_features_change_nothing(p, order, random):
    shuffled = p.tolist() + [0.] * 3
    random.shuffle(shuffled)
    assert hill_number(shuffled, order) == pytest.approx(hill_number(p, order), rel=1e-12)


@given(shares(most=10), st.integers(1, 5), orders)
def test_replication(p, copies, order):
    assert hill_number(p.repeat(copies) / copies, order) == pytest.approx(copies * hill_number(p, order), rel=1e-9)


@given(st.integers(1, 3000), orders)
def test_even_shares_count_themselves(n, order):
    assert hill_number(torch.ones(n) / n, order) == pytest.approx(n, rel=1e-9)


def test_subnormal_shares_and_extreme_orders():
    p = torch.tensor([1., 5e-324, 0.], dtype=torch.float64)
    assert [hill_number(p, q) for q in (0, .5, 1, 2, 1e308, math.inf)] == [2., 1., 1., 1., 1., 1.]
    assert hill_number(p, 1e-300) == 2. and 1 < hill_number(p, .001) < 2


@pytest.mark.parametrize("bad, message", [
    ([.5, .6], "sum to 1.1.*divide"), ([1.5, -.5], "negative"), ([float("nan"), 1.], "NaN"), ([], "shape"), ([[.5, .5]], "shape"), ([0., 0.], "sum to 0")])
def test_bad_shares_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        hill_number(bad)


@pytest.mark.parametrize("order", [-1, -1e-9, float("nan"), -math.inf])
def test_bad_orders_are_refused(order):
    with pytest.raises(ValueError, match="order"):
        hill_number([.5, .5], order)


def test_float32_shares_pass_the_sum_check():
    p = torch.rand(100_000)
    p = p / p.sum()
    assert hill_number(p) == pytest.approx(np.exp(entropy(p.double().numpy())), rel=1e-12)


# Streaming

@given(streams(), st.integers(1, 9), st.integers(3, 60))
def test_batch_cuts_change_nothing(stream, cut, n_groups):
    z, ids = stream
    for clusters in (None, ids):
        whole, pieces = ShareAccumulator(z.shape[1], n_groups).update(z, clusters), ShareAccumulator(z.shape[1], n_groups)
        for start in range(0, len(z), cut):
            pieces.update(z[start:start + cut], None if clusters is None else ids[start:start + cut])
        torch.testing.assert_close(pieces.shares, whole.shares, rtol=1e-12, atol=1e-15)
        close(pieces.estimate(), whole.estimate())


@given(streams(), st.randoms(use_true_random=False))
def test_sample_order_and_merge_order_change_nothing(stream, random):
    z, ids = stream
    whole, order = ShareAccumulator(z.shape[1]).update(z, ids), list(range(len(z)))
    random.shuffle(order)
    shards = [ShareAccumulator(z.shape[1]).update(z[order[i::3]], ids[order[i::3]]) for i in range(3)]
    random.shuffle(shards)
    merged = shards[0].merge(shards[1]).merge(shards[2])
    assert merged is shards[0]
    close(merged.estimate(), whole.estimate())
    torch.testing.assert_close(merged.shares, whole.shares, rtol=1e-12, atol=1e-15)


@given(streams(), st.randoms(use_true_random=False), st.sampled_from([1e-8, 7., 2.**60]))
def test_feature_order_and_scale_change_nothing(stream, random, scale):
    z, ids = stream
    columns = list(range(z.shape[1]))
    random.shuffle(columns)
    close(ShareAccumulator(z.shape[1]).update(-z[:, columns] * scale, ids).estimate(), ShareAccumulator(z.shape[1]).update(z, ids).estimate())


@given(streams())
def test_estimate_is_ordered_and_agrees_with_the_shares(stream):
    z, ids = stream
    e = ShareAccumulator(z.shape[1]).update(z, ids).estimate()
    assert 1 <= e.low <= e.value <= e.high and e.value <= z.shape[1] and e.stderr >= 0
    assert e.plug_in == pytest.approx(effective_features(feature_shares(z)), rel=1e-12)
    assert (e.n_samples, e.n_clusters) == (len(z), len(ids.unique()))


def test_higher_level_wider_interval_and_what_it_prints():
    acc = ShareAccumulator(5).update(torch.rand(300, 5, generator=torch.Generator().manual_seed(0))**4)
    a, b = acc.estimate(.5), acc.estimate(.99)
    assert b.low < a.low < a.value == b.value <= a.high < b.high
    assert "99% interval" in str(b) and "300 clusters" in str(b) and "300 samples" in repr(acc)
    assert b.correction == pytest.approx(1 - b.plug_in / b.value)


def test_ids_may_cover_leading_dimensions():
    z = torch.rand(6, 5, 4, 3)
    a = ShareAccumulator(3).update(z, torch.arange(6)).estimate()
    b = ShareAccumulator(3).update(z.reshape(-1, 3), torch.arange(6).repeat_interleave(20)).estimate()
    c = ShareAccumulator(3)
    for i in range(6): c.update(z[i], i)
    close(a, b), close(a, c.estimate())
    assert a.n_samples == 120 and a.n_clusters == 6


def test_without_ids_every_sample_is_a_cluster():
    z = torch.rand(130, 3)
    close(ShareAccumulator(3).update(z).estimate(), ShareAccumulator(3).update(z, torch.arange(130)).estimate())
    a, b = ShareAccumulator(3).update(z[:70]), ShareAccumulator(3).update(z[70:])
    assert a.merge(b).n_clusters == 130
    assert a.estimate().plug_in == pytest.approx(effective_features(feature_shares(z)), rel=1e-12)


def test_any_integer_ids():
    z = torch.rand(40, 3)
    ids = torch.randint(-2**62, 2**62, (40,), generator=torch.Generator().manual_seed(0))
    assert ShareAccumulator(3).update(z, ids).estimate().n_clusters == 40
    assert ShareAccumulator(3).update(z, np.arange(40, dtype=np.uint8)).update(z, list(range(40))).n_clusters == 40


def test_empty_batches_add_nothing():
    acc = ShareAccumulator(3).update(torch.zeros(0, 3)).update(torch.rand(9, 3), range(9)).update(torch.zeros(0, 3))
    assert (acc.n_samples, acc.n_clusters) == (9, 9) and acc.estimate().n_samples == 9
    assert ShareAccumulator(3).merge(acc).merge(ShareAccumulator(3)).n_clusters == 9


def test_silent_clusters_count():
    z = torch.rand(60, 4)
    z[::2] = 0
    assert ShareAccumulator(4).update(z, range(60)).estimate().n_clusters == 60


def test_degenerate_codes():
    same = ShareAccumulator(4).update(torch.tensor([[1., 2., 0., 1.]]).repeat(80, 1)).estimate()
    assert same.low == pytest.approx(same.high) == pytest.approx(2**1.5) and same.stderr < 1e-9
    single = ShareAccumulator(3).update(torch.tensor([[0., 5., 0.]]).repeat(80, 1)).estimate()
    assert single.low == single.value == 1 and single.high == pytest.approx(1)
    apart = ShareAccumulator(100).update(torch.eye(100)).estimate()  # every feature in one cluster: nothing is known of the rest
    assert apart.low < 100 < apart.high


def test_checkpoint_continues_the_stream(tmp_path):
    z = torch.rand(90, 3)
    for ids in (None, torch.arange(90) // 3):
        cut = [None, None] if ids is None else [ids[:50], ids[50:]]
        torch.save(ShareAccumulator(3, 20).update(z[:50], cut[0]).state_dict(), tmp_path / "state.pt")
        resumed = ShareAccumulator(3, 20).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.update(z[50:], cut[1]).estimate() == ShareAccumulator(3, 20).update(z[:50], cut[0]).update(z[50:], cut[1]).estimate()


def test_state_is_a_copy():
    acc = ShareAccumulator(2).update(torch.ones(5, 2), range(5))
    state = acc.state_dict()
    other = ShareAccumulator(2).load_state_dict(state)
    other.update(torch.ones(5, 2), range(5, 10))
    assert acc.n_clusters == 5 and len(state["ids"]) == 5 and torch.equal(state["sums"], acc.state_dict()["sums"])


@pytest.mark.parametrize("bad, clusters, message", [
    (torch.full((4, 3), float("nan")), [5, 6, 7, 8], "NaN"), (torch.ones(4, 2), [5, 6, 7, 8], "n_features=2"), (torch.ones(4, 3), [1, 2], "one id for each"),
    (torch.ones(4, 3), [1., 2., 3., 4.], "integer"), (torch.ones(4, 3), None, "in every update"), (torch.ones(4, 3, dtype=torch.bool), [5, 6, 7, 8], "bool")])
def test_bad_batches_add_nothing(bad, clusters, message):
    acc = ShareAccumulator(3).update(torch.rand(10, 3), range(10))
    before = acc.state_dict()
    with pytest.raises(ValueError, match=message):
        acc.update(bad, clusters)
    assert all(torch.equal(before[k], v) for k, v in acc.state_dict().items())


def test_other_mistakes_are_refused():
    acc = ShareAccumulator(3).update(torch.rand(10, 3))
    with pytest.raises(ValueError, match="in every update"): acc.update(torch.rand(2, 3), [20, 21])
    with pytest.raises(ValueError, match="in every update"): acc.merge(ShareAccumulator(3).update(torch.rand(2, 3), [0, 1]))
    with pytest.raises(ValueError, match="same n_features"): acc.merge(ShareAccumulator(4))
    with pytest.raises(ValueError, match="level"): acc.estimate(95)
    with pytest.raises(ValueError, match="no feature fires"): ShareAccumulator(3).estimate()
    with pytest.raises(ValueError, match="collect more samples"): ShareAccumulator(3).update(torch.ones(9, 3), [0] * 9).estimate()
    with pytest.raises(ValueError, match="n_features"): ShareAccumulator(0)
    with pytest.raises(ValueError, match="n_groups"): ShareAccumulator(3, n_groups=1)


# Uncertainty

def documents(rng, n, usage, presence, spread):
    "Clusters of very different size, each with some of the features; true shares are `usage`."
    size = rng.uniform(1, 100 * spread, (n, 1))
    return rng.poisson(size * usage / presence) * (rng.random((n, len(usage))) < presence)


@pytest.mark.parametrize("n, spread, power", [(64, 1., .4), (150, 5., .7), (400, 1., .2)])
def test_coverage_and_bias(n, spread, power):
    "95% intervals, 120 repetitions: 108 or more must cover (binomial: fewer has p < 0.5% at 95%), and the correction removes nearly all of the bias."
    rng, usage = np.random.default_rng(1), np.arange(1., 121)**-power
    usage /= usage.sum()
    truth = effective_features(usage)
    found = [ShareAccumulator(120).update(documents(rng, n, usage, .15, spread), range(n)).estimate() for _ in range(120)]
    assert sum(e.low <= truth <= e.high for e in found) >= 108
    plain, value = (np.mean([getattr(e, k) for e in found]) / truth - 1 for k in ("plug_in", "value"))
    scatter = np.std([e.value for e in found]) / truth / 120**.5
    assert plain < -.005 and abs(value) < min(.01, -plain / 2) + 2 * scatter
    assert np.mean([e.stderr for e in found]) == pytest.approx(np.std([e.value for e in found]), rel=.3)


@pytest.mark.parametrize("n", [64, 128])
def test_interval_follows_the_dependence_of_value_and_error(n):
    "Documents about one topic each, 300 times: 273 or more cover (binomial: fewer has p < 0.4% at 95%), misses lie on both sides; the symmetric interval misses on one."
    rng, usage = np.random.default_rng(5), np.arange(1., 201.)**-.6
    usage /= usage.sum()
    truth, found = effective_features(usage), []
    for _ in range(300):
        own = np.arange(200) % 10 == rng.integers(10, size=(n, 1))
        found.append(ShareAccumulator(200).update(rng.poisson(100 * usage * (.3 + 7 * own)), range(n)).estimate())
    too_high, too_low = (sum(ends) for ends in ([e.low > truth for e in found], [e.high < truth for e in found]))
    assert too_high + too_low <= 27 and too_high <= 3 * too_low + 5
    assert np.corrcoef([e.value for e in found], [e.stderr for e in found])[0, 1] < -.6 and max(e.shift for e in found) < 0
    plain = [combine_seeds([e.value], [e.stderr], e.df)[1] > truth for e in found]
    assert sum(plain) > too_high + 5


def test_shift_by_hand():
    "Two features in groups of one size: log F is a function of one share, so its skewness and curvature follow from two derivatives; without curvature the shift is Hall's."
    a = np.random.default_rng(0).gamma(1., size=50) / 100
    sums = torch.tensor(np.stack([.01 + a, .2 - a], 1))
    p, r = (sums.sum(0) / sums.sum())[0].item(), ((sums[:, 0] - sums[:, 0].mean()) / sums.sum()).numpy()
    slope, second = math.log((1 - p) / p), -1 / (p * (1 - p))
    _, stderr, _, skewness, curvature = _jackknife(sums, torch.ones(50, dtype=torch.int64))
    assert skewness == pytest.approx(slope**3 * (r**3).sum() / stderr**3, rel=1e-9)
    assert curvature == pytest.approx(slope**2 * second * ((r**2).sum()**2 - (r**4).sum()) / stderr**3, rel=1e-9)
    assert _shift(.01, 0., .95) == pytest.approx(.01 * (2 * 1.959964**2 + 1) / 6, rel=1e-3) and -1 <= _shift(-50., 3., .95) < -.99


def test_unequal_groups_beat_ignoring_their_size():
    "Thirty clusters in twenty groups: half the groups hold two. The linear part of F must come out as if every cluster counted once."
    z = torch.tensor(np.random.default_rng(0).gamma(1., size=(30, 6)))
    by_group, by_cluster = ShareAccumulator(6, 20).update(z, range(30)).estimate(), ShareAccumulator(6, 30).update(z, range(30)).estimate()
    assert by_group.value == pytest.approx(by_cluster.value, rel=5e-3) and by_group.stderr == pytest.approx(by_cluster.stderr, rel=.5)


# Several seeds

def test_combine_by_hand():
    F, e = [10., 12., 11.], [.5, .4, .6]
    logs, relative = np.log(F), np.square(e) / np.square(F)
    between, within = logs.var(ddof=1) / 3, relative.mean()  # the seeds share their samples: errors do not average out
    df = (between + within)**2 / (between**2 / 2 + within**2 / 24)
    reach = student.ppf(.95, df) * math.sqrt(between + within)
    assert combine_seeds(F, e, 24, .9) == pytest.approx((math.exp(logs.mean()), math.exp(logs.mean() - reach), math.exp(logs.mean() + reach)))


def test_combine_one_seed_and_no_error():
    reach = student.ppf(.975, 49) * .05
    assert combine_seeds([10.], [.5], 49) == pytest.approx((10, 10 * math.exp(-reach), 10 * math.exp(reach)))
    assert combine_seeds([10., 10.], [0., 0.], 49) == pytest.approx((10, 10, 10))
    assert np.isnan(combine_seeds([10.], [math.nan], math.nan, shift=[math.nan])[1:]).all()


def test_combine_shifts_by_the_mean_of_the_seeds():
    reach, move = student.ppf(.975, 12) * .05, .05 * (.2 - .6) / 2
    _, low, high = combine_seeds([10., 10.], [.5, .5], 12, shift=[.2, -.6])
    assert (low, high) == pytest.approx((10 * math.exp(move - reach), 10 * math.exp(move + reach)))
    assert combine_seeds([10.], [.5], 1e9, .5, [1.])[1] == pytest.approx(10.)  # the value stays inside


@pytest.mark.parametrize("between, within", [(.05, .02), (.02, .05), (.03, 0.)])
def test_combined_interval_covers(between, within):
    "Three seeds of one sample, 1500 times: a 95% interval covers the truth in 93% or more (binomial: fewer has p < 0.1%)."
    rng, truth = np.random.default_rng(0), 40.
    values = truth * np.exp(within * rng.standard_normal((1500, 1)) + between * rng.standard_normal((1500, 3)))
    ends = [combine_seeds(v.tolist(), (within * v).tolist(), 49) for v in values]
    assert .93 <= np.mean([low <= truth <= high for _, low, high in ends])
    if within: assert np.mean([low <= truth <= high for _, low, high in ends]) < .995


def test_errors_of_one_sample_rise_and_fall_together():
    "Two seeds with one error of 10 degrees of freedom know it no better than one does; of unequal errors the larger decides."
    one, two = combine_seeds([10.], [.5], 10), combine_seeds([10., 10.], [.5, .5], [10, 10])
    assert two == pytest.approx(one) and one[2] == pytest.approx(10 * math.exp(.05 * student.ppf(.975, 10)))
    parts = error_parts([0., 0.], [.3, .01], [10, 40])
    assert parts[0][0] == pytest.approx((.3**2 + .01**2) / 2) and 10 < parts[0][1] < 10.05
    assert half_width([(4., 7), (0., 2)], .9) == pytest.approx(2 * student.ppf(.95, 7))


def test_columns_for_a_table():
    acc = ShareAccumulator(4).update(torch.rand(90, 4))
    e = acc.estimate(.8)
    assert estimate_columns(acc, 3., .8) == dict(effective_features=e.value, low=e.low, high=e.high, stderr=e.stderr, df=e.df, shift=e.shift)
    assert list(estimate_columns(ShareAccumulator(4), 0.).values())[:4] == [0.] * 4
    few = estimate_columns(ShareAccumulator(4).update(torch.rand(9, 4), [0] * 9), 2.5)
    assert few["effective_features"] == 2.5 and all(math.isnan(few[k]) for k in ("low", "high", "stderr", "df", "shift"))


def test_sums_taken_elsewhere_are_an_update():
    z, ids = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([3, 53, 103]).repeat(4)
    a, b = ShareAccumulator(4).update(z, ids), ShareAccumulator(4).add_sums(3, z.sum(0, keepdim=True), set(ids.tolist()), 12)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-12, atol=0)
