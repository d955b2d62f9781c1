"""Dimensions and outliers: known manifolds, a library's own numbers, what is refused."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from superposition_lc.geometry import MASSIVE, OUTLIER, find_outliers, outlier_neurons, participation_ratio, relative_size, tame, two_nn


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- participation ratio

@given(n=st.integers(1, 8), s=st.integers(3, 40), seed=st.integers(0, 99))
def test_participation_ratio_is_that_of_the_eigenvalues(n, s, seed):
    x = normal(s, n, seed=seed)
    values = torch.linalg.eigvalsh(torch.cov(x.T).view(n, n)).clamp_min(0)
    assert participation_ratio(x) == pytest.approx((values.sum()**2 / values.square().sum()).item(), rel=1e-9)


def test_participation_ratio_ignores_scale_mean_and_rotation():
    x = normal(200, 6) * torch.tensor([3., 2, 1, 1, .5, .1], dtype=torch.float64)
    Q = torch.linalg.qr(normal(6, 6, seed=1)).Q
    for other in (1e-30 * x, 1e30 * x, x + 7, x @ Q):
        assert participation_ratio(other) == pytest.approx(participation_ratio(x), rel=1e-6)


# --- TwoNN

def two_nn_by_hand(x, discard=.1):
    "The definition (Facco et al. 2017), point by point."
    mu = []
    for i in range(len(x)):
        r = sorted(math.dist(x[i].tolist(), x[j].tolist()) for j in range(len(x)) if j != i)
        mu.append(r[1] / r[0])
    logs = [math.log(m) for m in sorted(mu)][:int(len(x) * (1 - discard))]
    y = [-math.log(1 - (i + 1) / len(x)) for i in range(len(logs))]
    return sum(a * b for a, b in zip(logs, y)) / sum(a * a for a in logs)


@pytest.mark.parametrize("s, n, discard", [(60, 3, .1), (101, 30, .25)])
def test_two_nn_is_the_definition(s, n, discard):
    x = normal(s, n)
    assert two_nn(x, discard) == pytest.approx(two_nn_by_hand(x, discard), rel=1e-9)


def test_two_nn_by_scikit_dimension():
    skdim = pytest.importorskip("skdim", reason="scikit-dimension is not installed: TwoNN is compared with its definition and known manifolds only")
    for n in (4, 40):  # the library finds neighbours in two ways
        x = normal(500, 3) @ normal(3, n, seed=1) + .01 * normal(500, n, seed=2)
        assert two_nn(x) == pytest.approx(skdim.id.TwoNN().fit(x.numpy()).dimension_, rel=1e-9)


def test_two_nn_gives_the_numbers_of_scikit_dimension():
    "Those that scikit-dimension 0.5.0 returned for points that need no random generator."
    i = torch.arange(400, dtype=torch.float64)[:, None]
    x = torch.cat([(i * a % 1) for a in (2**.5, 3**.5, 5**.5)], 1)
    assert two_nn(x) == pytest.approx(two_nn_by_hand(x), rel=1e-9)


@pytest.mark.parametrize("d", [1, 2, 4, 6])
def test_two_nn_knows_cubes_and_spheres(d):
    n = 3000
    for x in (uniform(n, d), torch.nn.functional.normalize(normal(n, d + 1))):
        y = torch.nn.functional.pad(x, (0, 20)) @ torch.linalg.qr(normal(x.shape[1] + 20, x.shape[1] + 20, seed=3)).Q
        assert two_nn(x) == pytest.approx(d, rel=.1)
        assert two_nn(y) == pytest.approx(two_nn(x), rel=1e-6)


def test_two_nn_ignores_copies_scale_order_and_shift():
    x = normal(300, 5)
    truth = two_nn(x)
    assert two_nn(torch.cat([x, x, x[:7]])) == pytest.approx(truth)
    assert two_nn(x.flip(0)) == pytest.approx(truth)
    assert two_nn(1e6 * x + 3e6) == pytest.approx(truth, rel=1e-6)
    assert two_nn(x.float()) == pytest.approx(truth, rel=1e-4)


def test_two_nn_in_blocks_is_the_same(monkeypatch):
    from superposition_lc import geometry
    x = normal(700, 9)
    whole = two_nn(x)
    monkeypatch.setattr(geometry._two_distances, "__defaults__", (64, 8))
    assert two_nn(x) == pytest.approx(whole, rel=1e-12)


def test_a_lattice_has_no_dimension():
    grid = torch.cartesian_prod(*[torch.arange(6.)] * 2)
    assert two_nn(grid) == math.inf


@pytest.mark.parametrize("call", [two_nn, participation_ratio, find_outliers, tame])
@pytest.mark.parametrize("x, says", [
    ([[1., 2.]], "got list"), (torch.ones(5), r"shape \(5,\)"), (torch.ones(5, 2, dtype=torch.long), "int64"), (torch.full((30, 2), math.nan), "NaN or infinite")])
def test_what_is_no_sample_is_refused(call, x, says):
    with pytest.raises(ValueError, match=says):
        call(x)


@pytest.mark.parametrize("call, says", [
    (lambda: two_nn(normal(9, 3)), "9 different samples"), (lambda: two_nn(torch.ones(99, 3)), "1 different samples"), (lambda: two_nn(normal(20, 3), 1.), r"lie in \[0, 1\)"),
    (lambda: two_nn(normal(20, 3), -.1), r"lie in \[0, 1\)"), (lambda: two_nn(normal(20, 3), .95), "lower it"), (lambda: participation_ratio(torch.ones(9, 3)), "constant")])
def test_what_has_no_dimension_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- outliers

def test_outliers_are_found_where_they_are():
    x = normal(500, 40)
    x[:, 11] *= 6 * OUTLIER
    x[:, 3] = 2 * OUTLIER
    x[5, 20] = 2 * MASSIVE * x.abs().median()
    found = find_outliers(x)
    assert found.neurons[:2] == (20, 11) and found.neurons[2] == 3 and found.massive.nonzero().flatten().tolist() == [5]
    assert found.size[11].item() == pytest.approx(6 * OUTLIER, rel=.15) and "20" in repr(found)
    assert find_outliers(1e-6 * x).neurons == found.neurons, "relative to the other neurons"


def test_a_layer_of_equals_has_no_outliers():
    x = normal(500, 40)
    assert find_outliers(x).neurons == () and not find_outliers(x).massive.any()
    silent = torch.zeros(10, 4)
    silent[0, 0] = 1
    assert find_outliers(silent).neurons == () and not find_outliers(silent).massive.any()


def test_relative_size():
    assert relative_size(torch.tensor([1., 4., 9.])).tolist() == [.5, 1., 1.5]
    assert outlier_neurons(torch.tensor([1., 6., 50., 1.])) == (2, 1)


def test_taming_touches_outliers_only_and_makes_them_ordinary():
    x = normal(800, 24)
    wild = x.clone()
    wild[:, 5] = 300 * x[:, 5] + 1000
    calm = tame(wild)
    assert calm.neurons == (5,) and find_outliers(calm(wild)).neurons == ()
    others = [i for i in range(24) if i != 5]
    assert torch.equal(calm(wild)[:, others], wild[:, others])
    assert torch.corrcoef(torch.stack([calm(wild)[:, 5], x[:, 5]]))[0, 1] > 1 - 1e-9
    assert calm(wild)[:, 5].std().item() == pytest.approx(1, rel=.1)
    assert torch.allclose(calm.undo(calm(wild)), wild)


def test_taming_holds_massive_values_and_constant_outliers():
    x = normal(800, 24)
    x[:2, 7] = 1e5
    calm = tame(x)
    assert calm(x)[:, 7].abs().max() <= 6
    constant = normal(800, 24)
    constant[:, 7] = 100.
    assert tame(constant)(constant)[:, 7].abs().max() == 0
    assert tame(x[2:])(x) is x
