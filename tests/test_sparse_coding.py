"""Sparse coding: optimal codes, detours of copies and sums, and what refinement keeps."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from superposition_lc.data import planted_activations
from superposition_lc import sparse_coding
from superposition_lc.sparse_coding import _handicap, _pack, _pursue, detour, refine, row_prices, sparse_codes, step_bound


def unit(*shape, seed=0, dtype=torch.float64):
    "Random rows of norm 1."
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("penalty", [.05, .5, 2.])
def test_codes_meet_the_optimality_conditions(penalty):
    "Gradient 0 where a code is active, not negative where it is not (Karush-Kuhn-Tucker)."
    W, x = unit(2, 12, 6), unit(2, 20, 6, seed=1) * 3
    z = sparse_codes(x, W, penalty, iterations=5000)
    gradient = 2 * (z @ W - x) @ W.mT + penalty
    assert (z >= 0).all() and gradient[z > 1e-6].abs().max() < 1e-4 and gradient.min() > -1e-4


def test_codes_without_penalty_are_nonnegative_least_squares():
    "SciPy's solver is the reference; as many rows as neurons, so that the solution is unique."
    W, x = unit(1, 6, 6), unit(1, 10, 6, seed=1)
    ours = sparse_codes(x, W, 0., iterations=20_000)[0].numpy()
    theirs = np.stack([nnls(W[0].T.numpy(), row.numpy())[0] for row in x[0]])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_stack_is_its_members_and_starts_do_not_matter():
    "Members do not see each other, and the optimum does not depend on where the search starts."
    W, x = unit(3, 12, 6), unit(3, 8, 6, seed=1)
    z = sparse_codes(x, W, .3, 3000)
    for k in range(3):
        torch.testing.assert_close(sparse_codes(x[k:k + 1], W[k:k + 1], .3, 3000)[0], z[k])
    torch.testing.assert_close(sparse_codes(x, W, .3, 3000, start=torch.ones(3, 8, 12, dtype=x.dtype)), z, atol=1e-4, rtol=0)


def test_rows_of_zeros_stay_silent():
    "The padding of a pruned dictionary."
    W = unit(1, 5, 6)
    z = sparse_codes(unit(1, 8, 6, seed=1), torch.cat([W, 0 * W], 1), .1)
    assert (z[..., 5:] == 0).all() and z[..., :5].sum() > 0


def test_bound_holds():
    "Above twice the largest eigenvalue of W W^T, for wide and tall dictionaries."
    for d in (3, 20):
        W = unit(2, d, 6)
        assert (step_bound(W).flatten() > 2 * torch.linalg.matrix_norm(W, 2)**2).all()


def test_detour_of_copies_sums_and_features():
    "1 for a copy, about sqrt 2 for a sum of two orthogonal rows, more for a direction of its own."
    e = torch.eye(10, dtype=torch.float64)
    W = torch.stack([e[0], e[1], e[2], e[0], (e[0] + e[1]) / 2**.5])[None]
    d = detour(W, torch.tensor([[5., 4., 3., 2., 1.]], dtype=torch.float64), slack=.01)[0]
    assert d[:3].min() > 10 and abs(d[3] - 1) < .02 and abs(d[4] - 2**.5) < .03


def test_pack_moves_kept_rows_to_the_front():
    "In their order, zero elsewhere, cut to the longest member."
    W = torch.arange(1., 9.).view(2, 4, 1)
    packed, = _pack(torch.tensor([[False, True, False, True], [False, False, True, False]]), W)
    assert packed[..., 0].tolist() == [[2., 4.], [7., 0.]]


def test_refine_finds_planted_directions_and_nothing_else():
    "From the true rows, spoilt by noise, with copies and sums added: the planted rows come back alone."
    p = planted_activations(24, 16, 4000, activity=.06, seed=3)
    x, true = p.activations / p.activations.square().mean().sqrt(), p.directions
    spoilt = torch.cat([true, true[:8], true[:8] + true[8:16]])
    spoilt = torch.nn.functional.normalize(spoilt + .05 * torch.randn(spoilt.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    W = refine([x], spoilt[None], None, .6, [0], steps=600)[0]
    kept = W[W.any(-1)]
    assert len(kept) == 24 and (kept @ true.T).amax(0).min() > .98
    assert W.shape == spoilt.shape and not W[24:].any()


def test_refine_is_deterministic_and_leaves_its_input_alone():
    "Same seed, same rows; a second member changes nothing; neither start nor samples are touched."
    x, start = planted_activations(16, 8, 500).activations, unit(1, 24, 8, dtype=torch.float32)
    before = start.clone(), x.clone()
    one, again = (refine([x], start, None, .6, [5], steps=60) for _ in range(2))
    both = refine([x, x], start.expand(2, -1, -1), None, .6, [5, 6], steps=60)
    assert one.equal(again) and start.equal(before[0]) and x.equal(before[1])
    torch.testing.assert_close(both[0], one[0], atol=1e-3, rtol=0)


def test_growing_finds_the_rows_that_are_missing():
    "A third of the planted rows is withheld at the start: plain refinement does not find them, growing finds all and no others."
    p = planted_activations(32, 16, 4000, activity=.05, seed=3)
    x, true = p.activations / p.activations.square().mean().sqrt(), p.directions
    start = torch.cat([true[:21], torch.zeros(19, 16)])[None]
    plain, grown = (refine([x], start, None, .6, [0], steps=1200, grow=grow)[0] for grow in (False, True))
    assert (plain @ true.T).amax(0)[21:].max() < .98
    assert grown.any(-1).sum() == 32 and (grown @ true.T).amax(0).min() > .97 and not grown[32:].any()


@pytest.mark.parametrize("seed", [0])
def test_rows_between_features_are_dispensable(seed):
    "Features that are on most of the time and rows between them, used as much: only the features are needed."
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(4000, 5, generator=g) * (torch.rand(4000, 5, generator=g) < .7)
    between = torch.nn.functional.normalize(torch.rand(20, 5, generator=g), dim=1)
    start = torch.cat([torch.eye(5), between])[None]
    plain, grown = (refine([x / x.square().mean().sqrt()], start, None, .6, [seed], steps=1800, grow=grow)[0] for grow in (False, True))
    assert plain.any(-1).sum() > 5 and grown.any(-1).sum() == 5 and (grown @ torch.eye(5)).amax(0).min() > .98


def test_sums_of_rows_are_not_added():
    "Two variables of four values each: rows for the sixteen sums would save penalty, and are no features."
    values = torch.randint(4, (2, 3000), generator=torch.Generator().manual_seed(0))
    x = torch.eye(8)[values[0]] + torch.eye(8)[4 + values[1]]
    start = torch.cat([torch.eye(8), torch.zeros(40, 8)])[None]
    W = refine([x / x.square().mean().sqrt()], start, None, .6, [0], steps=360, grow=True)[0]
    assert W.any(-1).sum() == 8 and sorted((W @ torch.eye(8)).argmax(1)[:8].tolist()) == list(range(8))


def test_a_dictionary_never_outgrows_its_size():
    "Rows that do not fit: the most used stay."
    p = planted_activations(32, 16, 2000, activity=.05, seed=3)
    W = refine([p.activations / p.activations.square().mean().sqrt()], p.directions[None, :21], None, .6, [0], steps=180, grow=True)
    assert W.shape == (1, 21, 16) and W.any(-1).all()


def test_growing_is_deterministic_and_a_stack_is_its_members():
    "Same seed, same rows, whatever stands beside it; a lean copy of one member leaves the others alone."
    x = planted_activations(16, 8, 2000, seed=1).activations
    dense = torch.rand(2000, 8, generator=torch.Generator().manual_seed(0))
    start = unit(1, 24, 8, dtype=torch.float32)
    one, again = (refine([x], start, None, .6, [5], steps=360, grow=True) for _ in range(2))
    both = refine([x, dense], start.expand(2, -1, -1), None, .6, [5, 6], steps=360, grow=True)
    assert one.equal(again)
    torch.testing.assert_close(both[0], one[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(), (20,), (5000, 20), (3, 1, 20), (3, 5000, 20)])
def test_codes_of_many_samples_are_those_of_few(shape):
    "They are found in pieces; a penalty may be of any shape that broadcasts."
    g = torch.Generator().manual_seed(0)
    x, W, penalty = torch.randn(3, 5000, 8, generator=g), torch.nn.functional.normalize(torch.randn(3, 20, 8, generator=g), dim=-1), torch.rand(shape, generator=g)
    few = slice(4000, 4060)
    part = penalty[..., few, :] if 5000 in shape else penalty
    torch.testing.assert_close(sparse_codes(x, W, penalty, 30)[:, few], sparse_codes(x[:, few], W, part, 30), rtol=1e-4, atol=1e-5)


def found(W, p): return (W @ p.directions.T).amax(0)  # how close the nearest row comes to each planted direction


@pytest.mark.parametrize("seed", [0, 1])
def test_pursuit_finds_independent_components(seed):
    "As many features as neurons: independent component analysis, where all directions are found; scale and mean do not matter."
    p = planted_activations(8, 8, 8000, activity=.1, seed=seed)
    W, moved = (_pursue(x[None], [torch.Generator().manual_seed(seed)])[0] for x in (p.activations, 100 * p.activations + 3))
    assert found(W, p).min() > .98 and found(moved, p).min() > .98


def test_pursuit_of_a_stack_is_that_of_its_members():
    "Alone or beside others, all directions are found; of silent activations there are none."
    ps = [planted_activations(8, 8, 4000, activity=.1, seed=s) for s in (0, 1)]
    W = _pursue(torch.stack([p.activations for p in ps] + [torch.zeros(4000, 8)]), [torch.Generator().manual_seed(s) for s in range(3)])
    for k, p in enumerate(ps):
        alone = _pursue(p.activations[None], [torch.Generator().manual_seed(k)])[0]
        assert found(alone, p).min() > .97 and found(W[k], p).min() > .97
    assert not W[2].any()


@pytest.mark.parametrize("seed", [0])
def test_a_crowded_layer_is_searched_again(seed, monkeypatch):
    "64 features in 16 neurons, 6 of them active at once: the first search misses many directions, the second finds nearly all."
    p = planted_activations(64, 16, 10_000, activity=.1, seed=seed)
    x, start = p.activations / p.activations.square().mean().sqrt(), unit(1, 128, 16, dtype=torch.float32)
    again = refine([x], start, None, .6, [seed], grow=True)[0]
    monkeypatch.setattr(sparse_coding, "_CROWDED", torch.inf)
    once = refine([x], start, None, .6, [seed], grow=True)[0]
    assert (found(again, p) > .95).float().mean() > .85 and (found(once, p) > .95).float().mean() < .75


def test_a_sparse_layer_is_searched_once(monkeypatch):
    "No second search, whatever it would bring, where few features are active at once."
    p = planted_activations(32, 16, 2000, activity=.03)
    monkeypatch.setattr(sparse_coding, "_pursue", lambda *_: pytest.fail("a second search"))
    W = refine([p.activations / p.activations.square().mean().sqrt()], p.directions[None], None, .6, [0], steps=180, grow=True)[0]
    assert found(W, p).min() > .98


def test_prices_rise_for_rows_that_are_hardly_used():
    "Of rows used the same, each pays the same; a row of zeros pays too, and is not in the way."
    g = torch.Generator().manual_seed(0)
    z = torch.rand(3000, 6, generator=g) * (torch.rand(3000, 6, generator=g) < torch.tensor([.2, .2, .2, .2, .02, .002]))
    W = torch.cat([torch.eye(6), torch.zeros(3, 6)])[None]
    price = row_prices(z[None], W, .1)[0, 0]
    assert (price[:4] / .1 - 1).abs().max() < .1 and price[3] < .9 * price[4] < .8 * price[5] and (price <= .4001).all()
    torch.testing.assert_close(row_prices(z.expand(2, -1, -1), W.expand(2, -1, -1), torch.tensor([[.1], [.2]]))[0, 0], price)


def test_light_tailed_rows_are_handicapped():
    "Half of the rows go free, wrong ones do not; scale, mean and rows of zeros change nothing for the others."
    p = planted_activations(64, 16, 10_000, activity=.1)
    W = torch.cat([p.directions, unit(1, 15, 16, dtype=torch.float32)[0]])
    handicap = _handicap(p.activations[None], W[None])[0]
    assert (handicap == 0).sum() == 40 and handicap[64:].median() < -1 < -.4 < handicap[:64].median()
    more = _handicap(100 * p.activations[None] + 3, torch.cat([W, torch.zeros(5, 16)])[None])[0]
    torch.testing.assert_close(more[:79], handicap, atol=1e-2, rtol=0)


@pytest.mark.parametrize("seed", [0])
def test_in_a_second_search_rows_that_are_no_features_starve(seed, monkeypatch):
    "256 features in 64 neurons: after 240 steps other rows are used a twentieth as much as a feature, at the first search's penalty half as much (control)."
    p = planted_activations(256, 64, 10_000, activity=.05, seed=seed)
    x = p.activations / p.activations.square().mean().sqrt()
    rows = _pursue(x[None], [torch.Generator().manual_seed(seed)])

    def others():
        s = sparse_coding._Search([x], [seed], rows.clone(), torch.tensor([[.6]]), again=True)
        for t in range(1, 241): s.step(t, 128, s.l1 * s.strict, 6e-3)
        best = torch.zeros(rows.shape[1], dtype=torch.bool).index_fill_(0, (s.W[0] @ p.directions.T).argmax(0), True)
        return (s.usage[0, ~best].median() / s.usage[0, best].median()).item()

    strict = others()
    monkeypatch.setattr(sparse_coding, "_STRICT", 1)
    assert strict < .1 and others() > .3


@pytest.mark.parametrize("n_neurons, steps", [(32, 50), (33, 100)])
def test_a_wide_layer_is_searched_longer_the_second_time(n_neurons, steps, monkeypatch):
    "Twice the steps from 33 neurons on; the first search takes the same at any width."
    taken = []
    monkeypatch.setattr(sparse_coding, "_learn", lambda s, steps, *_: taken.append(steps) or s.W)
    monkeypatch.setattr(sparse_coding, "_start_again", lambda s, W, x, seeds, learn: learn(s))
    refine([torch.rand(100, n_neurons)], unit(1, 8, n_neurons, dtype=torch.float32), None, .6, [0], steps=50, grow=True)
    assert taken == [50, steps]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("ratio, taken", [(.94, True), (.96, False)])
def test_a_second_search_has_to_pay(ratio, taken, lean, monkeypatch):
    "It is taken at 95% of the cost of the first without its lean copy, whichever of the two was chosen."
    whole, second = unit(1, 12, 4, dtype=torch.float32), unit(1, 12, 4, dtype=torch.float32).flip(1)
    W = torch.cat([whole[:, :5], torch.zeros(1, 7, 4)], 1) if lean else whole.clone()
    x = torch.rand(1, 100, 4)
    s = SimpleNamespace(whole=whole, probe=x, tau=torch.ones(1, 1, 1), l1=torch.ones(1, 1), alive=[x[0]])
    costs = iter([(torch.tensor([3.]), torch.tensor([2.])), (torch.tensor([3.]), torch.tensor([2. * ratio]))])
    monkeypatch.setattr(sparse_coding, "_judged", lambda *_: next(costs))
    got = sparse_coding._start_again(s, W.clone(), [x[0]], [0], lambda r: second)
    assert got.equal(second if taken else W)
