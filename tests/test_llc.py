"""The local learning coefficient: models whose coefficient is known, the dynamics step by step, stacks, and what is refused."""
import math

import pytest
import torch
from torch import nn

from superposition_lc import local_learning_coefficient
from superposition_lc.experiments.grokking import TwoPathMLP, grokking_gradients, pairs


def half_square(out, y):
    return ((out[..., 0] - y)**2).mean() / 2


def quiet(*args, **kwargs):
    return local_learning_coefficient(*args, **kwargs, progress=False)


def regression(d, n=200, seed=0):
    "A line at its least-squares fit, and its data."
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g)
    y = X @ torch.randn(d, generator=g) + .1 * torch.randn(n, generator=g)
    line = nn.Linear(d, 1, bias=False)
    line.weight.data = torch.linalg.lstsq(X, y[:, None]).solution.T
    return line, X, y


FULL = dict(loss=half_square, nbeta=100., lr=2e-3, localization=1., batch_size=200, burn_in=300)


@pytest.mark.parametrize("d", [2, 10])
def test_a_regular_model_has_half_its_parameters(d):
    "Against the exact stationary value of the dynamics, spring and step length included, and d/2."
    line, X, y = regression(d)
    a = torch.linalg.eigvalsh(X.T @ X / len(X))
    h = 100 * a + 1
    exact = (50 * a / h / (1 - 2e-3 * h / 4)).sum().item()
    found = quiet(line, X, y, **FULL, draws=300, chains=64).table.llc[0]
    assert found == pytest.approx(exact, rel=.06) and found == pytest.approx(d / 2, rel=.12)


class Power(nn.Module):
    "w^(2k), whatever the input."

    def __init__(self, k):
        super().__init__()
        self.k, self.w = k, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.w**(2 * self.k) + 0 * x


@pytest.mark.parametrize("k, lr", [(1, 1e-4), (2, 1e-3), (3, 1e-3)])
def test_flat_minima_have_less(k, lr):
    "Watanabe: 1/(2k) for w^(2k)."
    x = torch.zeros(2, 1)
    found = quiet(Power(k), x, x, loss=lambda out, y: out.mean(), nbeta=500., lr=lr, localization=0., burn_in=400, draws=400, chains=256).table.llc[0]
    assert found == pytest.approx(1 / (2 * k), rel=.12)


class Product(nn.Module):
    "y = u v x: two parameters, one direction that counts."

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.tensor(2.)), nn.Parameter(torch.tensor(2.))

    def forward(self, x):
        return self.u * self.v * x


def test_a_direction_without_effect_does_not_count():
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    found = quiet(Product(), x, 4 * x[:, 0], **FULL | dict(nbeta=500., lr=2e-5), draws=500, chains=128).table.llc[0]
    assert found == pytest.approx(.5, abs=.06)


def test_the_dynamics_are_those_of_the_equation():
    "Three steps by hand: gradient, spring and noise of the documented sizes; the loss is taken before the step."
    line, X, y = regression(3)
    out = quiet(line, X, y, loss=half_square, nbeta=7., lr=.01, localization=2., batch_size=50, chains=1, draws=4, seed=5)
    g, w, w0 = torch.Generator().manual_seed(5), line.weight.detach().clone().requires_grad_(), line.weight.detach()
    for draw in range(4):
        i = torch.randperm(200, generator=g)[:50]
        loss = ((X[i] @ w[0] - y[i])**2).mean() / 2
        assert out.trace[0, 0, draw].item() == pytest.approx(loss.item(), rel=1e-5)
        grad, = torch.autograd.grad(loss, w)
        noise = torch.randn(1, 3, generator=g)
        w = (w - .005 * (7 * grad + 2 * (w - w0)) + .1 * noise).detach().requires_grad_()
    start = half_square(line(X), y).item()
    assert out.table.init_loss[0] == pytest.approx(start, rel=1e-6)
    assert out.table.llc[0] == pytest.approx(7 * (out.trace.mean().item() - start), rel=1e-5)


def modular(K=4, p=7):
    "A stack of small untrained networks, with data for each."
    x, y = pairs(p)
    nets = []
    for k in range(K):
        with torch.random.fork_rng():
            torch.manual_seed(k)
            nets.append(TwoPathMLP(p, 3, 5))
    return nets, {n: torch.stack([dict(net.named_parameters())[n].detach() for net in nets]) for n, _ in nets[0].named_parameters()}, x, y


SHORT = dict(nbeta=2., lr=3e-3, localization=5., draws=20, batch_size=16)


def test_a_checkpoint_does_not_depend_on_its_neighbours(monkeypatch):
    "Alone, in a stack, and in a stack that is worked off in groups."
    from superposition_lc import llc
    nets, stack, x, y = modular()
    whole = quiet(nets[0], x, y, stack, **SHORT)
    for k, net in enumerate(nets):
        assert torch.allclose(quiet(net, x, y, **SHORT).trace[0], whole.trace[k], rtol=1e-4)
    monkeypatch.setattr(llc, "_GROUP", 1)
    assert torch.allclose(quiet(nets[0], x, y, stack, **SHORT).trace, whole.trace, rtol=1e-4)


def test_data_of_its_own_for_each_checkpoint():
    nets, stack, x, y = modular()
    rows = torch.stack([torch.randperm(49, generator=torch.Generator().manual_seed(k))[:30] for k in range(4)])
    whole = quiet(nets[0], x[rows], y[rows], stack, own_data=True, **SHORT)
    by_hand = quiet(nets[0], x[rows], y[rows], stack, own_data=True, gradients=grokking_gradients, **SHORT)
    assert torch.allclose(by_hand.trace, whole.trace, rtol=1e-3)
    for k, net in enumerate(nets):
        alone = quiet(net, x[rows[k]], y[rows[k]], **SHORT)
        assert torch.allclose(alone.trace[0], whole.trace[k], rtol=1e-4) and alone.table.init_loss[0] == pytest.approx(whole.table.init_loss[k], rel=1e-5)


def test_gradients_by_hand_are_those_of_autograd():
    nets, stack, x, y = modular()
    assert torch.allclose(quiet(nets[0], x, y, stack, gradients=grokking_gradients, **SHORT).trace, quiet(nets[0], x, y, stack, **SHORT).trace, rtol=1e-3)


def test_the_network_and_the_random_numbers_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(.5), nn.Linear(4, 2))
    net[0].eval()
    x, before, state = torch.randn(10, 3), {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    a, b, c = (quiet(net, x, torch.zeros(10, dtype=torch.long), draws=5, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.trace, b.trace) and not torch.equal(a.trace, c.trace) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert [m.training for m in net] == [False, True, True]


def test_table_and_warnings():
    line, X, y = regression(3)
    stack = {"weight": torch.stack([line.weight.detach(), line.weight.detach() + 3])}
    t = quiet(line, X, y, stack, **FULL, draws=400, chains=16)
    assert list(t.table.columns) == ["checkpoint", "llc", "stderr", "init_loss", "draw_loss", "warning"] and t.trace.shape == (2, 16, 400)
    assert t.table.warning[0] == "" and t.table.warning[1].startswith("negative")
    wild = quiet(line, X, y, **FULL | dict(lr=.2, burn_in=0), draws=400).table
    assert wild.warning[0] == "diverged" and not math.isfinite(wild.llc[0])
    slow = quiet(line, X, y, **FULL | dict(lr=1e-6, burn_in=0), draws=200, chains=64).table
    assert slow.warning[0].startswith("still moving")
    assert math.isnan(quiet(line, X, y, **FULL, draws=2, chains=1).table.stderr[0])


def test_the_default_temperature_is_that_of_the_theory():
    line, X, y = regression(2)
    rest = {k: v for k, v in FULL.items() if k != "nbeta"}
    assert torch.equal(quiet(line, X, y, **rest, draws=3).trace, quiet(line, X, y, **rest, nbeta=200 / math.log(200), draws=3).trace)


@pytest.mark.parametrize("change, says", [
    (dict(lr=0.), "lr must be a finite number above 0"), (dict(lr=math.nan), "lr must be"), (dict(nbeta=-1.), "nbeta must be a finite number above 0"), (dict(localization=-1.), "localization must be a finite number of at least 0"),
    (dict(chains=0), "chains must be an integer of at least 1"), (dict(draws=2.5), "draws must be an integer"), (dict(burn_in=-1), "burn_in"), (dict(batch_size=0), "batch_size"), (dict(chains=True), "chains"),
    (dict(parameters={}), "these do not fit"), (dict(parameters={"weight": torch.zeros(2, 3)}), r"must have shape \(checkpoints, 1, 3\)"), (dict(parameters={"weight": torch.full((2, 1, 3), math.inf)}), "hold NaN or infinite"),
    (dict(parameters={"weight": torch.zeros(0, 1, 3)}), "must have shape"), (dict(inputs=torch.zeros(3)), "must go together"), (dict(inputs=torch.zeros(0, 3)), "must have shape"), (dict(inputs=[[1.]]), "must be a torch.Tensor"),
    (dict(inputs=torch.full((200, 3), math.nan)), "inputs hold NaN"), (dict(own_data=True, inputs=torch.zeros(2, 9, 3), targets=torch.zeros(2, 9)), r"a data set for each of the 1 checkpoint"), (dict(own_data=True, targets=torch.zeros(200)), "must have shape")])
def test_bad_input_is_refused(change, says):
    line, X, y = regression(3)
    with pytest.raises(ValueError, match=says):
        quiet(**dict(model=line, inputs=X, targets=y, loss=half_square) | change)


def test_nothing_to_perturb_is_refused():
    with pytest.raises(ValueError, match="has no parameters"):
        quiet(nn.ReLU(), torch.ones(3, 1), torch.ones(3))
