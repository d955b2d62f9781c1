"""PGD, adversarial training and the experiment: the attack's promises, determinism, the table."""
import dataclasses
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from superposition_lc.activations import capture
from superposition_lc.data import load_dataset
from superposition_lc.experiments import adversarial as module
from superposition_lc.experiments.adversarial import (ATTACKS, AdversarialConfig, accuracy, attack, check_attacks, mlp, plot, ramp, robust_loss, robust_scores, run,
                                                      train_networks, train_robust)
from superposition_lc.measurement import measure_activations
from superposition_lc.sae import SAEConfig

replace = dataclasses.replace
TINY = AdversarialConfig(n_train=200, n_test=100, widths=(12, 8), eps=(0., .1), attack_steps=2, epochs=3, sae_seeds=1,
                         estimator=SAEConfig(expansion=4, kind="relu", steps=50, max_rounds=2, warmup=10))
DATA = load_dataset(n_train=300, n_test=100)


@pytest.fixture(scope="module")
def model():
    "A network that has learned a little; tests must leave it as it is."
    torch.manual_seed(0)
    return train_robust(mlp(64, (16,), 10), DATA, 0., replace(TINY, epochs=15)).eval()


@pytest.fixture(scope="module")
def table():
    return run(TINY, progress=False)


def loss(model, x, y=DATA.y_test):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y).item()


# --- the attack

@settings(max_examples=25)
@given(eps=st.floats(1e-4, 1.5), steps=st.integers(1, 5), seed=st.integers(0, 2**31), method=st.sampled_from(ATTACKS))
def test_attack_stays_in_its_ball_and_in_range(model, eps, steps, seed, method):
    x = DATA.x_test.clone()
    attacked = attack(model, x, DATA.y_test, eps, steps, seed, method)
    assert attacked.shape == x.shape and attacked.dtype == x.dtype and not attacked.requires_grad
    assert (attacked - x).abs().max() <= eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert torch.equal(x, DATA.x_test)


def test_radius_zero_is_identity(model):
    assert torch.equal(attack(model, DATA.x_test, DATA.y_test, 0), DATA.x_test)
    assert torch.equal(attack(model, DATA.x_test, DATA.y_test, 0.), DATA.x_test)


def test_attack_does_harm(model):
    "More than noise of the same size; more with a larger radius."
    losses = [loss(model, attack(model, DATA.x_test, DATA.y_test, eps)) for eps in (0., .03, .1, .2)]
    assert losses == sorted(losses) and losses[0] == loss(model, DATA.x_test)
    noise = (DATA.x_test + .1 * torch.randn(DATA.x_test.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    assert losses[2] > 1.3 * loss(model, noise)
    attacked = attack(model, DATA.x_test, DATA.y_test, .2)
    assert accuracy(model, attacked, DATA.y_test) < accuracy(model, DATA.x_test, DATA.y_test) - .2


def test_attack_is_that_of_torchattacks(model):
    from torchattacks import FGSM, PGD
    found = attack(model, DATA.x_test, DATA.y_test, .1, steps=4, seed=5)
    torch.manual_seed(5)
    assert torch.equal(found, PGD(model, eps=.1, alpha=2.5 * .1 / 4, steps=4)(DATA.x_test, DATA.y_test))


    assert torch.equal(attack(model, DATA.x_test, DATA.y_test, .1, method="fgsm"), FGSM(model, eps=.1)(DATA.x_test, DATA.y_test))


@pytest.mark.parametrize("method", ["pgd", "autoattack"])
def test_attack_is_seeded_and_leaves_random_numbers_alone(model, method):
    state = torch.get_rng_state()
    a, b, c = (attack(model, DATA.x_test, DATA.y_test, .1, 2, seed, method) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_autoattack_is_the_strongest(classes):
    "Also where its targeted loss, which needs four logits, has no place."
    data = load_dataset("digits", classes)
    torch.manual_seed(0)
    net = train_robust(mlp(64, (16,), classes), data, 0., replace(TINY, epochs=15)).eval()
    x, y, eps = data.x_test[:60], data.y_test[:60], {2: .3, 3: .15, 10: .1}[classes]
    fgsm, pgd, best = (accuracy(net, attack(net, x, y, eps, 10, method=m), y) for m in ("fgsm", "pgd", "autoattack"))
    assert best <= pgd <= fgsm < accuracy(net, x, y) and best < .8


def noisy_net():
    "A network with modules that behave otherwise in training."
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.5), nn.Linear(8, 10))


@pytest.mark.parametrize("method", ATTACKS)
def test_attack_leaves_parameters_and_their_gradients_alone(method):
    "Left to itself, AutoAttack fills `.grad`."
    net = noisy_net()
    for i, p in enumerate(net.parameters()):
        p.grad = None if i == 0 else torch.randn_like(p)
    net[-1].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    attack(net, DATA.x_test[:20], DATA.y_test[:20], .1, 3, 0, method)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # running statistics, too
    assert all(p.grad is g if g is None else torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads))
    assert [p.requires_grad for p in net.parameters()] == [True] * 5 + [False]


def flags(net):
    return [m.training for m in net.modules()]


def test_attack_restores_modes():
    for train in (True, False):
        net = noisy_net().train(train)
        attack(net, DATA.x_test, DATA.y_test, .1, 2)
        assert flags(net) == [train] * 7


def test_attack_restores_the_mode_of_every_module():
    "Training with a part that is held in eval mode."
    net = noisy_net().train()
    net[2].eval()
    before = flags(net)
    attack(net, DATA.x_test, DATA.y_test, .1, 2)
    assert flags(net) == before


def test_attack_that_fails_restores_modes():
    net = noisy_net().train()
    with pytest.raises(Exception):
        attack(net, DATA.x_test, DATA.y_test + 100, .1, 2)  # no such classes
    assert flags(net) == [True] * 7


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x - .5, lambda x: x + 1e-3, lambda x: x * math.nan, lambda x: x + math.inf])
def test_images_out_of_range_are_refused(model, change):
    for eps in (0., .1):
        with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from .*normalisation"):
            attack(model, change(DATA.x_test), DATA.y_test, eps)


@pytest.mark.parametrize("eps", [-.1, -1e-12, math.nan, math.inf, -math.inf])
def test_bad_radius_is_refused(model, eps):
    with pytest.raises(ValueError, match="eps must be a finite number >= 0, got"):
        attack(model, DATA.x_test, DATA.y_test, eps)


@pytest.mark.parametrize("bad", ["PGD", "cw", ""])
def test_unknown_attack_is_refused(model, bad):
    with pytest.raises(ValueError, match="method must be one of pgd, fgsm, autoattack, got"):
        attack(model, DATA.x_test, DATA.y_test, .1, method=bad)


# --- can the attack be believed?

class Behind(nn.Module):
    "A network behind a step that spoils its gradient."
    def __init__(self, net, step):
        super().__init__()
        self.net, self.step = net, step
    def forward(self, x): return self.step(self.net, x)


def test_attacks_on_an_honest_network_are_believed(model):
    t = check_attacks(model, DATA.x_test, DATA.y_test, (.3, .1, .5), steps=10)
    assert t.radius.tolist() == [.1, .3, .5] and (t.warning == "").all() and (t.no_gradient == 0).all()
    assert t.pgd.is_monotonic_decreasing and (t.pgd <= t.fgsm).all() and (t.fgsm < t.noise).all()
    assert t.pgd.tolist() == [accuracy(model, attack(model, DATA.x_test, DATA.y_test, e, 10), DATA.y_test) for e in t.radius]


SPOILED = {"rounded": (lambda net, x: net((8 * x).round() / 8), "no gradient at 100% of the images"), 
           "saturated": (lambda net, x: net(x).double().mul(1e4).softmax(1).float(), "no gradient at"),
           "shattered": (lambda net, x: net(x + .05 * (300 * x).sin()), "PGD weaker than")}


@pytest.mark.parametrize("how", SPOILED)
def test_masked_gradients_are_found(model, how):
    step, says = SPOILED[how]
    t = check_attacks(Behind(model, step), DATA.x_test, DATA.y_test, (.05, .1, .5), steps=5)
    assert t.warning.str.contains(says).any(), t
    scores = robust_scores(Behind(model, step), DATA, .1, .05, 5)
    assert says in scores["attack_warning"]


def test_accuracy_that_rises_is_suspicious():
    r = dict(radius=.5, noise=.9, fgsm=.5, pgd=.5, no_gradient=0.)
    assert module._suspicions(r, .4, .1, .02) == "accuracy rises with the radius; survives a radius that leaves no image"
    assert module._suspicions(r | dict(pgd=.1, fgsm=.1), .4, .1, .02) == ""
    assert module._suspicions(r | dict(radius=.3, pgd=.55, noise=.4), .6, .1, .02) == "PGD weaker than FGSM; PGD weaker than noise"


def test_checking_leaves_the_network_alone():
    net = noisy_net().eval()
    net[1].weight.grad = torch.ones_like(net[1].weight)
    state, before = torch.get_rng_state(), flags(net)
    check_attacks(net, DATA.x_test, DATA.y_test, (.1,), 2)
    assert torch.equal(state, torch.get_rng_state()) and flags(net) == before and (net[1].weight.grad == 1).all() and net[1].bias.grad is None


def test_scores_of_a_network(model):
    s = robust_scores(model, DATA, 0., .1, 4)
    assert s["accuracy"] == s["accuracy_eps"] == s["accuracy_fgsm"] == accuracy(model, DATA.x_test, DATA.y_test) and s["attack_warning"] == ""
    s = robust_scores(model, DATA, .2, .1, 4, seed=3)
    for column, eps, how in [("accuracy_eps", .2, "pgd"), ("accuracy_common", .1, "pgd"), ("accuracy_fgsm", .2, "fgsm")]:
        assert s[column] == accuracy(model, attack(model, DATA.x_test, DATA.y_test, eps, 4, 3, how), DATA.y_test)


# --- networks and training

def test_mlp():
    net = mlp(64, (16, 8), 10)
    assert [n for n, _ in net.named_children()] == ["flatten", "fc1", "relu1", "fc2", "relu2", "head"]
    assert net(DATA.x_test).shape == (100, 10) and [p.shape[0] for n, p in net.named_parameters() if "weight" in n] == [16, 8, 10]


def test_accuracy(model):
    right = (model(DATA.x_test).argmax(1) == DATA.y_test).tolist()
    assert accuracy(model, DATA.x_test, DATA.y_test) == sum(right) / 100
    assert accuracy(model, DATA.x_train, DATA.y_train) > .8


def test_ramp():
    assert [ramp(e, 10) for e in range(10)] == [1/3] * 2 + [2/3] * 3 + [1] * 5
    assert ramp(0, 1) == 1/3 and ramp(0, 30) == 1/3 and ramp(29, 30) == 1


@pytest.mark.parametrize("bad, name", [(dict(eps=()), "eps"), (dict(eps=(0., -.1)), "eps"), (dict(eps=(.1, .1)), "eps"), (dict(widths=()), "widths"),
                                       (dict(widths=(8, 0)), "widths"), (dict(eps=(0., math.nan)), "eps"), (dict(eps=(math.inf,)), "eps"),
                                       (dict(attack_steps=0), "attack_steps"), (dict(attack="autoattack"), "attack"), (dict(weighting="half"), "weighting"), (dict(batch_size=0), "batch_size"), (dict(sae_seeds=0), "sae_seeds")], ids=str)
def test_bad_settings_are_refused(bad, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        AdversarialConfig(**bad)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdversarialConfig().seed = 1


@pytest.mark.parametrize("eps", [0., .1])
def test_training_is_deterministic(eps):
    def trained(seed, elsewhere):
        torch.manual_seed(0)
        net = mlp(64, (8,), 10)
        torch.manual_seed(elsewhere)  # the global state must not matter
        return train_robust(net, DATA, eps, replace(TINY, seed=seed)).state_dict()
    a, b, c = trained(0, 1), trained(0, 2), trained(1, 1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["fc1.weight"], c["fc1.weight"])


def gradient(net, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])


@pytest.mark.parametrize("method, steps", [("pgd", 3), ("pgd", 1), ("fgsm", 7)])
def test_released_weighting_adds_the_gradient_of_the_last_step(method, steps):
    "The released training step, written out: PGD whose backward leaves its last gradient in the parameters."
    torch.manual_seed(0)
    net, x, y, eps, ce = mlp(64, (16,), 10), DATA.x_train[:50], DATA.y_train[:50], .2, nn.functional.cross_entropy
    config = AdversarialConfig(attack=method, attack_steps=steps, weighting="released")
    found = gradient(net, robust_loss(net, x, y, eps, config, seed=5))
    torch.manual_seed(5)
    moved, step = (x.clone(), eps) if method == "fgsm" else ((x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1), 2.5 * eps / steps)
    for _ in range(1 if method == "fgsm" else steps):
        moved.requires_grad_()
        net.zero_grad()
        ce(net(moved), y).backward()
        moved = (x + (moved.detach() + step * moved.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1).detach()
    (.5 * ce(net(x), y) + .5 * ce(net(moved), y)).backward()  # without zero_grad
    assert torch.allclose(found, torch.cat([p.grad.flatten() for p in net.parameters()]), atol=1e-6)
    even = gradient(net, robust_loss(net, x, y, eps, replace(config, weighting="even"), seed=5))
    assert found.norm() > 1.5 * even.norm()


def test_without_attack_weightings_and_attacks_are_one():
    def trained(**how):
        torch.manual_seed(0)
        return train_robust(mlp(64, (8,), 10), DATA, 0., replace(TINY, **how)).state_dict()
    a, *others = trained(), trained(weighting="released"), trained(attack="fgsm")
    assert all(torch.equal(a[k], o[k]) for o in others for k in a)


def test_training_against_fgsm_makes_robust_against_fgsm():
    data, nets = train_networks(replace(TINY, attack="fgsm", n_train=None, widths=(32,), epochs=15), progress=False)
    plain, robust = (accuracy(n, attack(n, data.x_test, data.y_test, .1, method="fgsm"), data.y_test) for n in nets.values())
    assert robust > plain + .1


def test_training_reports_progress_and_attacks_with_the_ramped_radius(monkeypatch):
    radii, seen, true = [], [], attack
    monkeypatch.setattr(module, "attack", lambda m, x, y, eps, *a, **k: (radii.append(eps), true(m, x, y, eps, *a, **k))[1])
    train_robust(mlp(64, (8,), 10), DATA, .3, replace(TINY, epochs=6, batch_size=300), seen.append)
    assert radii == pytest.approx([.1] * 2 + [.2] + [.3] * 3) and seen == [300] * 6


def test_robust_training_makes_robust():
    config = replace(TINY, n_train=None, widths=(32,), epochs=20, attack_steps=4)
    data, nets = train_networks(config, progress=False)
    assert list(nets) == [0., .1] and len(data.x_train) == 1347
    attacked = {eps: accuracy(net, attack(net, data.x_test, data.y_test, .1), data.y_test) for eps, net in nets.items()}
    clean = {eps: accuracy(net, data.x_test, data.y_test) for eps, net in nets.items()}
    assert attacked[.1] > attacked[0.] + .1 and clean[0.] > .85


def test_networks_start_equal(monkeypatch):
    starts = []
    monkeypatch.setattr(module, "train_robust", lambda net, *a: (starts.append(net.fc1.weight.detach().clone()), net)[1])
    state = torch.get_rng_state()
    train_networks(TINY, progress=False)
    assert torch.equal(*starts) and torch.equal(state, torch.get_rng_state())


# --- the experiment

def test_one_row_a_radius_kind_and_layer(table):
    assert table[["eps", "inputs", "layer"]].values.tolist() == [[e, i, l] for e in (0., .1) for i in ("clean", "attacked") for l in ("relu1", "relu2")]
    assert list(table)[:8] == ["eps", "inputs", "layer", "accuracy", "accuracy_eps", "accuracy_common", "accuracy_fgsm", "attack_warning"]
    assert {"n_neurons", "effective_features", "low", "high", "l0", "fvu", "dead_fraction", "converged", "warning"} <= set(table)
    assert table.n_neurons.tolist() == [12, 8] * 4 and (table.n_samples == 200).all()
    assert table[["accuracy", "accuracy_eps", "accuracy_common"]].stack().between(0, 1).all()


def test_without_attack_clean_and_attacked_are_one(table):
    clean, attacked = (table[(table.eps == 0) & (table.inputs == kind)].drop(columns="inputs").reset_index(drop=True) for kind in ("clean", "attacked"))
    pd.testing.assert_frame_equal(clean, attacked)
    assert (clean.accuracy == clean.accuracy_eps).all()
    a, b = (table[(table.eps == .1) & (table.inputs == kind)].effective_features.tolist() for kind in ("clean", "attacked"))
    assert a != b


def test_run_is_deterministic(table):
    pd.testing.assert_frame_equal(run(TINY, progress=False), table, check_exact=True)
    assert not run(replace(TINY, seed=1), progress=False).effective_features.equals(table.effective_features)


def test_rows_are_the_measurement_of_the_networks(table):
    data, nets = train_networks(TINY, progress=False)
    x = {"clean": data.x_train, "attacked": attack(nets[.1], data.x_train, data.y_train, .1, 2, 0)}
    for kind in x:
        a = capture(nets[.1], x[kind], "relu2")["relu2"]
        found = measure_activations(a, TINY.estimator, 1, progress=False).table.iloc[0]
        row = table[(table.eps == .1) & (table.inputs == kind) & (table.layer == "relu2")].iloc[0]
        assert row.effective_features == pytest.approx(found.effective_features, rel=1e-3) and row.l0 == pytest.approx(found.l0, rel=1e-2)
        assert row.accuracy == accuracy(nets[.1], data.x_test, data.y_test)
        assert row.accuracy_eps == row.accuracy_common == accuracy(nets[.1], attack(nets[.1], data.x_test, data.y_test, .1, 2, 0), data.y_test)


def test_radii_in_any_order(table):
    turned = run(replace(TINY, eps=(.1, 0.)), progress=False)
    assert turned.eps.tolist() == [.1] * 4 + [0.] * 4
    a, b = (t.set_index(["eps", "inputs", "layer"]).sort_index() for t in (turned, table))
    assert a.accuracy.equals(b.accuracy) and a.effective_features.tolist() == pytest.approx(b.effective_features.tolist(), rel=1e-3)


def test_plot(table):
    ax = plt.subplots(1, 2)[1]
    left, right = plot(table, "relu2", ax)
    assert left is ax[0] and right is ax[1] and "relu2, 8 neurons" in left.get_title(loc="left") + left.get_title()
    assert {t.get_text() for t in left.get_legend().get_texts()} >= {"clean images", "attacked images"}
    assert [list(line.get_ydata()) for line in right.lines][0] == table[(table.layer == "relu2") & (table.inputs == "clean")].accuracy.tolist()
    assert len(plot(table)) == 2


def test_attack_on_a_model_without_parameters_names_the_fix():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    class Closure(nn.Module):
        def forward(self, x): return net(x)
    with pytest.raises(ValueError, match="make the network a submodule"): attack(Closure(), torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long), .1)
