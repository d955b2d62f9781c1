"""Sparse autoencoders: gradients against autograd, quality, files, stacks, rounds, scale, bad input, and a known answer."""
import dataclasses
import json
import math
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from superposition_lc import sae as module, sparse_coding
from superposition_lc.data import planted_activations
from superposition_lc.sae import SAEConfig, SparseAutoencoder, check_activations, energy_scale, sae_gradients, sae_quality, train_sae
from superposition_lc.sparse_coding import sparse_codes

replace = dataclasses.replace
QUICK = SAEConfig(expansion=3, kind="relu", steps=40, max_rounds=2, warmup=10, batch_size=32)
LASSO = replace(QUICK, kind="sparse_coding", refine_steps=24)
KINDS = ["relu", "sparse_coding"]
X = planted_activations(12, 8, 400).activations


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(n=4, d=6, stack=None, k=None, tied=True, lasso=False, seed=0, dtype=torch.float64):
    "An autoencoder whose parameters and scale are all random."
    sae, g = SparseAutoencoder(n, d, stack, k, tied, lasso).to(dtype), generator(seed)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    sae.scale.copy_(torch.rand(sae.scale.shape, generator=g, dtype=dtype) + .5)
    return sae


def fit(x=X, config=QUICK, seeds=1):
    return train_sae(x, config, seeds, progress=False)


# --- the model

shapes = st.fixed_dictionaries(dict(n=st.integers(1, 6), d=st.integers(1, 9), stack=st.integers(1, 4), k=st.integers(1, 9) | st.none(),
                                    tied=st.booleans(), seed=st.integers(0, 2**31)))


@settings(max_examples=80)
@given(shape=shapes, batch=st.integers(1, 7), mean=st.booleans(), l1=st.floats(0, 3))
def test_gradients_equal_autograd(shape, batch, mean, l1):
    shape = {**shape, "k": shape["k"] and min(shape["k"], shape["d"])}
    sae = filled(**shape)
    sae.scale.fill_(1)  # x is scaled already
    x = torch.randn(shape["stack"], batch, shape["n"], generator=generator(shape["seed"]), dtype=torch.float64)
    weight = 1 / shape["n"] if mean else 1.
    l1 = l1 * torch.rand(shape["stack"], 1, 1, generator=generator(1), dtype=torch.float64)
    grads, loss = sae_gradients(sae, x, l1, weight)
    x_hat, z = sae(x)
    expected = (weight * (x_hat - x).square().sum((1, 2)) + (l1 * z).sum((1, 2))) / batch  # Eq. 5, and its mean over neurons
    expected.sum().backward()
    assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    assert grads.keys() == dict(sae.named_parameters()).keys()
    for name, p in sae.named_parameters():
        assert_close(grads[name], p.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [-4., -1.5, -.5, -99.])
def test_few_active_codes_have_the_same_gradients(monkeypatch, dtype, tolerance, bias):
    "Skipping codes that are zero is faster and changes nothing, whether some, most or all are."
    sae, x, l1 = filled(130, 150, stack=3, dtype=dtype), torch.randn(3, 40, 130, generator=generator(1)).to(dtype), torch.tensor([0., .3, 2.], dtype=dtype).view(3, 1, 1)
    sae.weight.data = nn.functional.normalize(sae.weight.data, dim=-1)
    sae.bias.data = sae.bias.data * .1 + bias
    found = []
    for few in (0., 1.):
        monkeypatch.setattr(module, "_FEW", few)
        found.append(sae_gradients(sae, x, l1, .7))
    assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


def test_training_takes_the_way_of_few_codes_and_ends_the_same(monkeypatch):
    x, used, true = planted_activations(256, 128, 300).activations, [], module._few_codes
    monkeypatch.setattr(module, "_few_codes", lambda *args: (used.append(1), true(*args))[1])
    config = replace(QUICK, expansion=4, l1=3., steps=60, tolerance=1e-12)
    a = fit(x, config, seeds=2)
    assert 0 < len(used) < 120  # not while most codes are active
    monkeypatch.setattr(module, "_WIDE", 129)
    b = fit(x, config, seeds=2)
    assert_close(a.sae.state_dict(), b.sae.state_dict(), rtol=1e-3, atol=1e-3)
    assert a.table.effective_features.tolist() == pytest.approx(b.table.effective_features.tolist(), rel=1e-3)


@given(shape=shapes, lead=st.lists(st.integers(1, 3), max_size=2), lasso=st.booleans())
def test_forward_is_decode_of_encode(shape, lead, lasso):
    shape = {**shape, "k": shape["k"] and min(shape["k"], shape["d"])}
    if lasso: shape |= dict(lasso=True, k=None, tied=True)
    sae = filled(**shape)
    single = sae[0]
    for s, x in [(sae, torch.randn(5, shape["n"], dtype=torch.float64)), (sae, torch.randn(shape["stack"], 5, shape["n"], dtype=torch.float64)),
                 (single, torch.randn(*lead, shape["n"], dtype=torch.float64))]:
        x_hat, z = s(x)
        assert torch.equal(z, s.encode(x)) and torch.equal(x_hat, s.decode(z)) and x_hat.shape[-1] == shape["n"]
        assert (z >= 0).all() and (s.k is None or ((z > 0).sum(-1) <= s.k).all())


def test_model_by_hand():
    sae = filled(tied=False)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator())
    z = torch.relu((x / sae.scale - sae.decoder_bias) @ sae.weight.T + sae.bias)
    assert_close(sae.encode(x), z)
    assert_close(sae.decode(z), (z @ sae.decoder + sae.decoder_bias) * sae.scale)
    top = filled(k=2, tied=False).encode(x)
    kept = z.sort(descending=True).values[:, 1:2].clamp_min(1e-300)
    assert_close(top, torch.where(z >= kept, z, 0.))


def test_lasso_codes_are_the_best():
    "No other non-negative code has a smaller penalised error; rows of zeros stay silent."
    sae = filled(lasso=True, stack=2)
    sae.weight.data = nn.functional.normalize(sae.weight.data, dim=-1)
    sae.weight.data[0, 4:] = 0
    sae.penalty.copy_(torch.tensor([.1, .5])[:, None] * torch.linspace(.5, 1.5, 6))  # every row has its own
    x = torch.randn(2, 50, 4, dtype=torch.float64, generator=generator(1))
    z, scaled = sae.encode(x), x / sae.scale[:, None, None]
    loss = lambda z: (scaled - z @ sae.weight).square().sum((1, 2)) + (sae.penalty[:, None] * z).sum((1, 2))
    assert (z >= 0).all() and (z[0, :, 4:] == 0).all() and (loss(z) <= loss(sparse_codes(scaled, sae.weight, sae.penalty[:, None], 20_000)) * 1.001).all()
    assert (z[1] > 0).sum() < (z[0, :, :4] > 0).sum() * 1.5
    for change in (.9, 1.1):
        assert (loss(z * change) > loss(z)).all()


@pytest.mark.parametrize("kind", [dict(k=2, tied=False), dict(lasso=True)], ids=str)
def test_members_of_a_stack(kind):
    sae, x = filled(stack=3, **kind), torch.randn(5, 4, dtype=torch.float64)
    for i in range(3):
        assert sae[i].stack is None and sae[i].k == kind.get("k") and sae[i].lasso == kind.get("lasso", False)
        assert_close(sae[i].encode(x), sae.encode(x)[i])
        assert_close(sae[i](x)[0], sae(x)[0][i])
    assert sae[-1].scale == sae.scale[2] and sae[[2, 0]].stack == 2
    sae[0].weight.data.zero_()
    assert (sae.weight[0] != 0).all()  # a copy
    with pytest.raises(TypeError, match="single"):
        sae[0][0]


@pytest.mark.parametrize("bad", [dict(n_neurons=0), dict(n_features=0), dict(stack=0), dict(k=0), dict(k=7)])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must"):
        SparseAutoencoder(**{**dict(n_neurons=4, n_features=6), **bad})


@pytest.mark.parametrize("kind", [dict(k=2), dict(tied=False)], ids=str)
def test_lasso_codes_have_neither_encoder_nor_top(kind):
    "An argument that would be passed over is refused."
    with pytest.raises(ValueError, match="lasso"):
        SparseAutoencoder(4, 6, lasso=True, **kind)


@pytest.mark.parametrize("stack, shape", [(None, (5, 3)), (2, (5, 3)), (2, (3, 5, 4)), (2, (4,)), (2, (1, 2, 5, 4))])
def test_bad_shapes(stack, shape):
    with pytest.raises(ValueError, match=r"x must have shape .*got \("):
        filled(stack=stack).encode(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="z must have shape"):
        filled(stack=stack).decode(torch.zeros(5, 3, dtype=torch.float64))


# --- quality

def test_quality_of_the_mean_is_zero():
    "The mean alone explains no variance: FVU 1, and nothing fires."
    sae = SparseAutoencoder(8, 6, tied=False)
    sae.bias.data.fill_(-1e6)
    sae.decoder_bias.data = X.mean(0)
    q = sae_quality(sae, X)
    assert q["fvu"].item() == pytest.approx(1, abs=1e-6)
    assert [q[k].item() for k in ("effective_features", "l0", "dead_fraction")] == [0, 0, 1]


def test_quality_of_a_perfect_code_is_one():
    x = torch.rand(50, 5, generator=generator()) + .1
    sae = SparseAutoencoder(5, 5)
    sae.weight.data = torch.eye(5)
    q = sae_quality(sae, x)
    assert q["fvu"].item() == 0 and q["l0"].item() == 5 and q["dead_fraction"].item() == 0
    assert 4.5 < q["effective_features"].item() <= 5


def test_quality_does_not_depend_on_chunks(monkeypatch):
    sae, x = filled(stack=2), torch.randn(50, 4, dtype=torch.float64, generator=generator())
    whole = sae_quality(sae, x)
    monkeypatch.setattr(module._chunks, "__defaults__", (7 * 12,))
    parts = sae_quality(sae, x)
    assert len(list(module._chunks(sae, x))) == 8
    for name in whole:
        assert_close(parts[name], whole[name])


# --- files

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sae")


@pytest.mark.parametrize("stack", [None, 1, 3])
@pytest.mark.parametrize("kind", [dict(), dict(tied=False), dict(k=2), dict(k=2, tied=False), dict(lasso=True), dict(dtype=torch.float32)])
def test_files_are_exact(tmp_path, stack, kind):
    sae, path = filled(stack=stack, **kind), tmp_path / "sae.safetensors"
    sae.save(path)
    back = SparseAutoencoder.load(path)
    assert (back.n_neurons, back.n_features, back.stack, back.k, back.tied) == (4, 6, stack, kind.get("k"), kind.get("tied", True))
    assert back.lasso == kind.get("lasso", False)
    assert back.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(v, sae.state_dict()[k]) and v.dtype == sae.state_dict()[k].dtype for k, v in back.state_dict().items())
    x = torch.randn(5, 4).to(sae.weight)
    assert all(torch.equal(a, b) for a, b in zip(back(x), sae(x)))


def loads_or_refuses(path):
    "Load, or a ValueError."
    try:
        SparseAutoencoder.load(path)
    except ValueError:
        pass


def test_file_cut_short(folder):
    path = folder / "cut"
    filled(stack=2).save(path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError):
            SparseAutoencoder.load(path)


def test_file_with_one_bit_flipped(folder):
    path, rng = folder / "flipped", random.Random(0)
    filled(stack=2, tied=False).save(path)
    whole = path.read_bytes()
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.randrange(500)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        loads_or_refuses(path)


META = dict(format="superposition_lc.sae", version=1, stack=2, k=None, tied=False, lasso=False)


@pytest.mark.parametrize("meta, without", [(META, "bias"), ({**META, "stack": None}, ""), ({**META, "stack": 3}, ""), ({**META, "tied": True}, ""),
                                           ({k: v for k, v in META.items() if k != "k"}, ""), ({**META, "k": "x"}, ""), ({**META, "k": 99}, ""), ({**META, "lasso": True}, ""), ([1], "")])
def test_file_whose_header_does_not_fit(folder, meta, without):
    state = {k: v for k, v in filled(stack=2, tied=False).state_dict().items() if k != without}
    save_file(state, folder / "unfit", metadata={"sae": json.dumps(meta)})
    with pytest.raises(ValueError, match="unfit"):
        SparseAutoencoder.load(folder / "unfit")


def test_foreign_files(folder):
    (folder / "text").write_text("not a file of tensors")
    save_file({"weight": torch.ones(2, 2)}, folder / "foreign")
    for name, says in [("text", "not a readable safetensors"), ("foreign", r"not written by SparseAutoencoder.save: it holds \['weight'\]")]:
        with pytest.raises(ValueError, match=says):
            SparseAutoencoder.load(folder / name)
    with pytest.raises(FileNotFoundError):
        SparseAutoencoder.load(folder / "missing")


def test_reading_leaves_random_numbers_alone(folder):
    filled(stack=2).save(folder / "sae")
    state = torch.get_rng_state()
    SparseAutoencoder.load(folder / "sae")[0]
    assert torch.equal(torch.get_rng_state(), state)


# --- settings

def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAEConfig().l1 = 1.
    assert SAEConfig(expansion=2.4).n_features(10) == 24 and SAEConfig(expansion=.01).n_features(8) == 1


BAD = [dict(expansion=0), dict(expansion=math.inf), dict(expansion="8"), dict(l1=-1), dict(l1=math.nan), dict(l1=None), dict(kind="gelu"), dict(k=3),
       dict(k=0, kind="topk"), dict(k=None, kind="topk"), dict(k=2., kind="topk"), dict(unit_norm=False, tied=False, kind="relu"), dict(reduction="max"),
       dict(tied=False), dict(unit_norm=False), dict(reduction="mean"), dict(epochs=3), dict(refine_steps=0), dict(refine_steps=1.5), dict(grow=1),
       dict(scale="rms"), dict(scale=None), dict(lr=0), dict(lr=math.nan), dict(beta2=1), dict(beta2=0), dict(warmup=-1), dict(warmup=1.5), dict(batch_size=0),
       dict(batch_size=2.5), dict(batch_size=True), dict(steps=0), dict(max_rounds=0), dict(tolerance=0), dict(tolerance=math.inf), dict(epochs=0), dict(patience=0),
       dict(tied="no", kind="relu"), dict(unit_norm=None, kind="relu")]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_settings_are_refused_by_name(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"SAEConfig.{name} must be .*, got"):
        SAEConfig(**bad)
    if len(bad) == 1 and name not in ("tied", "unit_norm"):
        with pytest.raises(ValueError, match=f"SAEConfig.{name}"):
            replace(SAEConfig(), **bad)


def test_released():
    c = SAEConfig.released()
    assert (c.expansion, c.l1, c.reduction, c.lr, c.batch_size, c.unit_norm, c.scale, c.kind, c.tied) == (4, .1, "mean", 1e-3, 128, False, "none", "relu", True)
    assert (c.epochs, c.patience, c.beta2, c.warmup) == (800, 10, .999, 0)
    assert SAEConfig.released(l1=.5).l1 == .5 and c == SAEConfig.released()
    rows = module._initial_rows(50, 200, c, generator())
    bound = math.sqrt(6 / 250)  # Xavier, uniform
    assert .99 * bound < rows.abs().max() <= bound and rows.mean().abs() < .01 * bound and rows.std().item() == pytest.approx(bound / 3**.5, rel=.02)
    norms = fit(config=replace(c, epochs=2)).sae.weight.norm(dim=-1)
    assert norms.std() > 1e-3  # free


# --- the scale

def test_energy_scale_by_hand():
    x = torch.tensor([[3., 4.], [0., 1.]])  # energies 25 and 1
    assert energy_scale(x).item() == pytest.approx(math.sqrt((625 + 1) / 2 / (26 / 2 * 2)))
    assert energy_scale(torch.ones(7, 3)).item() == pytest.approx(1)
    stack = torch.randn(3, 50, 4, dtype=torch.float64)
    e = stack.square().sum(-1)
    assert_close(energy_scale(stack), (e.square().mean(-1) / (4 * e.mean(-1))).sqrt())


@given(seed=st.integers(0, 1000), power=st.integers(-60, 60), silent=st.integers(0, 500))
def test_energy_scale_is_homogeneous_and_ignores_silence(seed, power, silent):
    x = torch.randn(20, 3, generator=generator(seed))
    assert energy_scale(x * 2.**power).item() == pytest.approx(energy_scale(x).item() * 2.**power, rel=1e-6)
    assert energy_scale(torch.cat([x, torch.zeros(silent, 3)])).item() == pytest.approx(energy_scale(x).item(), rel=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_energy_scale_of_extreme_values(size):
    x = torch.randn(50, 4, generator=generator())
    assert energy_scale(x * size).item() == pytest.approx(energy_scale(x).item() * size, rel=1e-5)


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
@pytest.mark.parametrize("factor", [1e-3, 1e3, 1e-25, 1e25])
def test_units_of_the_network_change_nothing(factor, config):
    "The same F, L0 and FVU, and decode returns the units that came in."
    a, b = fit(config=config), fit(X * factor, config)
    for name, tolerance in [("effective_features", 1e-3), ("l0", 1e-2), ("fvu", 1e-2)]:
        assert b.table[name].item() == pytest.approx(a.table[name].item(), rel=tolerance)
    assert_close(b.sae(X * factor)[0] / factor, a.sae(X)[0], rtol=1e-2, atol=1e-3)


def test_scale_none():
    t = fit(config=replace(QUICK, scale="none"))
    assert t.sae.scale.tolist() == [1] and fit().sae.scale.item() == energy_scale(X).item()


# --- training

@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_table_and_history(config):
    t = fit(config=[config, replace(config, l1=.3)], seeds=[5, 2])
    assert list(t.table) == ["data", "l1", "seed", "n_steps", "effective_features", "l0", "fvu", "dead_fraction", "converged"]
    assert t.table[["data", "l1", "seed"]].values.tolist() == [[0, .6, 5], [0, .6, 2], [0, .3, 5], [0, .3, 2]]
    assert list(t.history) == ["data", "l1", "seed", "step", "loss", "effective_features", "l0", "fvu", "dead_fraction"]
    assert t.table.converged.dtype == bool and t.sae.stack == 4
    q = sae_quality(t.sae, X)
    for name, values in q.items():
        assert_close(torch.tensor(t.table[name]), values)
    last = t.history.groupby(["l1", "seed"], sort=False).last()
    if config is QUICK: assert last.effective_features.tolist() == t.table.effective_features.tolist()  # all samples fit into the probe
    assert t.table.n_steps.tolist() == (last.step + (24 if config is LASSO else 0)).tolist()
    assert t.sae.lasso == (config is LASSO)
    if config is LASSO: assert (t.sae.penalty == torch.tensor([.15, .15, .075, .075])[:, None]).all()  # without the search all rows pay the same


def test_rounds_double():
    t = fit(config=replace(QUICK, steps=10, max_rounds=4, tolerance=1e-12), seeds=2)
    assert t.history.step.tolist() == [10, 10, 20, 20, 40, 40, 80, 80]
    assert t.table.n_steps.tolist() == [80, 80] and not t.table.converged.any()


def test_converged_members_leave_and_others_go_on():
    "With the gaps between rounds known, a tolerance lets one member leave; the rest ends as if it had never been there."
    config = replace(QUICK, steps=20, max_rounds=4, tolerance=1e-12)
    F = fit(config=config, seeds=4).history.pivot(index="seed", columns="step", values="effective_features").to_numpy()
    gaps = abs(F[:, 1:] - F[:, :-1]) / F[:, :-1]
    tolerance = float(sorted(gaps[:, :-1].min(1))[1]) * (1 + 1e-6)
    t = fit(config=replace(config, tolerance=tolerance), seeds=4)
    for row, gap in zip(t.table.itertuples(), gaps):
        below = [i for i, g in enumerate(gap) if g <= tolerance]
        assert row.converged == bool(below) and row.n_steps == 20 * 2**(below[0] + 1 if below else 3)
        assert row.effective_features == pytest.approx(F[row.seed][below[0] + 1 if below else 3], rel=1e-4)
    assert t.table.n_steps.nunique() > 1


def test_epochs():
    short = replace(QUICK, epochs=3, patience=3)
    t = fit(config=short, seeds=2)
    assert t.history.step.tolist() == [13, 13, 26, 26, 39, 39] and not t.table.converged.any()  # 400 / 32, rounded up
    still = fit(config=replace(short, epochs=100, patience=2, lr=1e-9))  # the loss only wavers
    assert still.table.converged.item() and still.table.n_steps.item() < 1300
    loss = still.history.loss.tolist()
    assert min(loss) == loss[-3]  # two epochs without a new best


def test_rate(monkeypatch):
    "Rises over `warmup` steps of the first round, and falls to zero in every round."
    rates, step = [], module._Adam.step
    monkeypatch.setattr(module._Adam, "step", lambda self, grads, lr: (rates.append(lr), step(self, grads, lr))[1])
    fit(config=replace(QUICK, tolerance=1e-12, lr=.01))
    expected = [.01 * min(1, (i + 1) / 10) * (1 + math.cos(math.pi * (i % 40) / 40)) / 2 for i in range(80)]
    assert rates == pytest.approx(expected)


@given(n=st.integers(2, 9), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_every_epoch_sees_every_sample_once(n, sizes):
    "However many samples are drawn at once."
    drawn, whole = module._Order(n, generator()), module._Order(n, generator())
    order = torch.cat([drawn(s) for s in sizes])
    assert torch.equal(order, whole(sum(sizes)))
    for epoch in order.split(n): assert len(epoch.unique()) == len(epoch)


@pytest.mark.parametrize("fused", [True, False])
def test_adam_is_that_of_torch(fused):
    "Ten steps with a changing rate, then more with members taken out."
    g, start = generator(), {"a": torch.randn(3, 4, 2, dtype=torch.float64), "b": torch.randn(3, 4, dtype=torch.float64)}
    class Elsewhere(torch.Tensor): # says that it lies on another device, where there is no fused step
        device = property(lambda self: torch.device("cpu") if fused else torch.device("meta"))
    ours, theirs = {k: nn.Parameter(v.clone()) for k, v in start.items()}, {k: nn.Parameter(v.clone()) for k, v in start.items()}
    adam, reference = module._Adam(ours, .99), torch.optim.Adam(theirs.values(), betas=(.9, .99))
    adam.params = {k: p if fused else p.as_subclass(Elsewhere) for k, p in adam.params.items()}
    for i in range(10):
        grads = {k: torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in start.items()}
        for k, p in theirs.items(): p.grad = grads[k].clone()
        reference.param_groups[0]["lr"] = .1 / (i + 1)
        reference.step()
        adam.step(grads, .1 / (i + 1))
    for k in start: assert_close(ours[k], theirs[k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_l0_falls_with_l1(config):
    stack = [replace(config, l1=v, steps=200, refine_steps=100) for v in (.05, .1, .3, .6, 1.)]
    t = fit(config=stack)
    assert t.table.l1.tolist() == [c.l1 for c in stack]
    assert (t.table.l0.diff()[1:] < 0).all() and (t.table.fvu.diff()[1:] > 0).all()


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_same_seed_same_table_and_global_state_untouched(config):
    state = torch.get_rng_state()
    a = fit(config=config, seeds=2)
    torch.rand(7)
    b = fit(config=config, seeds=2)
    assert a.table.equals(b.table) and a.history.equals(b.history)
    assert all(torch.equal(v, b.sae.state_dict()[k]) for k, v in a.sae.state_dict().items())
    assert not torch.allclose(a.sae.weight[0], a.sae.weight[1])
    torch.set_rng_state(state)
    fit(config=config)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [dict(), dict(tied=False), dict(kind="topk", k=3), dict(unit_norm=False, reduction="mean", l1=.1), dict(kind="sparse_coding", refine_steps=24)], ids=str)
def test_member_equals_the_same_autoencoder_alone(kind):
    config = replace(QUICK, **kind, tolerance=1e-12)
    other = replace(config, l1=1.)
    alone = fit(config=config, seeds=[3])
    for stack, i in [(fit(config=[other, config], seeds=[0, 3]), 3), (fit(config=config, seeds=[3, 1, 4]), 0)]:
        assert_close(stack.sae[i].state_dict(), alone.sae[0].state_dict(), rtol=1e-4, atol=1e-4)
        assert stack.table.effective_features[i] == pytest.approx(alone.table.effective_features[0], rel=1e-3)


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_several_data_sets(config):
    "Each data set has its own scale, and members equal to those trained on it alone."
    x = torch.stack([X, 5 * X.roll(1, 1) + .1])
    config = replace(config, tolerance=1e-12)
    t = fit(x, config, seeds=2)
    assert t.table.data.tolist() == [0, 0, 1, 1] and t.table.seed.tolist() == [0, 1, 0, 1]
    assert_close(t.sae.scale, energy_scale(x).repeat_interleave(2))
    alone = fit(x[1], config, seeds=2)
    assert_close(t.sae[[2, 3]].state_dict(), alone.sae.state_dict(), rtol=1e-4, atol=1e-4)
    assert t.table.fvu[2:].tolist() == pytest.approx(alone.table.fvu.tolist(), rel=1e-3)


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_large_stacks_are_cut_into_groups(monkeypatch, config):
    whole = fit(config=config, seeds=5)
    monkeypatch.setattr(module, "_GROUP", 2 * 32 * 24)
    parts = fit(config=config, seeds=5)
    assert_close(parts.sae.state_dict(), whole.sae.state_dict(), rtol=1e-4, atol=1e-4)
    assert parts.table.seed.tolist() == list(range(5))


@pytest.mark.parametrize("kind", [dict(), dict(tied=False), dict(lr=1.), dict(kind="topk", k=2)], ids=str)
def test_rows_stay_on_the_sphere(kind):
    sae = fit(config=replace(QUICK, **kind), seeds=2).sae
    norms = (sae.weight if sae.tied else sae.decoder).norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-5


def test_only_sparse_coding_grows():
    assert SAEConfig().grow and not SAEConfig.quick().grow and not SAEConfig(kind="relu", grow=True).grow and not SAEConfig.released().grow


def test_the_search_counts_what_is_left_out_without_it():
    "Four features a neuron: rows that no training step would make are added."
    p = planted_activations(64, 16, 4000, activity=.04, seed=7)
    quick, searched = (fit(p.activations, c(steps=300, max_rounds=2), seeds=1).table.effective_features[0] / p.effective_features for c in (SAEConfig.quick, SAEConfig))
    assert quick < .95 and abs(searched - 1) < .03


def test_members_side_by_side_are_members_one_by_one():
    "As many threads as one likes, which are as many afterwards."
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(fit(config=replace(LASSO, refine_steps=60), seeds=12).sae.weight)
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_refined_rows_are_on_the_sphere_or_gone():
    "Rows that are features come first; the others are zero and silent."
    t = fit(config=replace(LASSO, refine_steps=200), seeds=2)
    norms = t.sae.weight.norm(dim=-1)
    gone = norms == 0
    assert ((norms - 1).abs()[~gone] < 1e-5).all() and gone.any() and (gone.int().diff(dim=1) >= 0).all()
    assert (t.sae.encode(X).detach().amax(1)[gone] == 0).all()
    assert (t.table.dead_fraction >= gone.double().mean(1).numpy()).all()


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_input_is_left_alone(config):
    x = X.clone().requires_grad_()
    t = fit(x, config)
    assert torch.equal(x, X) and x.grad is None and x.requires_grad
    assert fit(X.T.contiguous().T, config).table.equals(t.table)  # strides do not matter


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_double_precision_and_few_samples(config):
    t = fit(X.double(), config)
    assert t.sae.weight.dtype == t.sae.scale.dtype == torch.float64
    assert t.table.effective_features.item() == pytest.approx(fit(config=config).table.effective_features.item(), rel=.05)
    assert fit(X[:2], config).table.n_steps.item() - (24 if config is LASSO else 0) in (40, 80)  # fewer samples than a batch
    silent = torch.cat([X, torch.zeros(100, 8)])
    assert fit(silent, config).table.fvu.item() < .5


# --- when things go wrong

def spoiled(monkeypatch, at, spoil):
    "From call `at` on, `spoil(gradients, sae)` is done to stacks of more than one."
    calls, true = [], module.sae_gradients
    def gradients(sae, *args, **kwargs):
        out = true(sae, *args, **kwargs)
        calls.append(1)
        if len(calls) == at: spoil(out[0], sae)
        return out
    monkeypatch.setattr(module, "sae_gradients", gradients)


def nan_gradient(grads, sae):
    grads["weight"][0, 0, 0] = math.nan


def infinite_bias(grads, sae):
    sae.bias.data[0, 0] = math.inf


@pytest.mark.parametrize("kind", [QUICK, LASSO], ids=KINDS)
@pytest.mark.parametrize("at, spoil", [(10, nan_gradient), (40, nan_gradient), (60, nan_gradient), (10, infinite_bias), (40, infinite_bias)])
def test_a_member_that_diverges_is_reported_and_the_others_kept(monkeypatch, at, spoil, kind):
    config = replace(kind, max_rounds=3, tolerance=1e-12)
    good = fit(config=config, seeds=3)
    spoiled(monkeypatch, at, spoil)
    t = fit(config=config, seeds=3)
    first, *rest = t.table.to_dict("records")
    assert math.isnan(first["effective_features"]) and not first["converged"] and first["n_steps"] < rest[0]["n_steps"]
    assert [r["effective_features"] for r in rest] == pytest.approx(good.table.effective_features[1:].tolist(), rel=1e-3)
    assert [r["n_steps"] for r in rest] == [160 + (24 if kind is LASSO else 0)] * 2


@pytest.mark.parametrize("kind", [dict(lr=1e30), dict(lr=1e30, unit_norm=False), dict(lr=1e30, tied=False), dict(lr=3e38, unit_norm=False, steps=1, warmup=0),
                                  dict(lr=1e30, kind="sparse_coding", refine_steps=24)], ids=str)
def test_absurd_rates_do_not_crash(kind):
    t = fit(config=replace(QUICK, **kind), seeds=2)
    assert len(t.table) == 2 and not ((t.table.fvu < .9) & t.table.converged).any()


@pytest.mark.parametrize("config", [QUICK, LASSO], ids=KINDS)
def test_nothing_fires(config):
    "A penalty that is worth more than any reconstruction."
    t = fit(config=replace(config, l1=1e5, warmup=0, steps=300), seeds=2)
    assert t.table.effective_features.tolist() == t.table.l0.tolist() == [0, 0] and t.table.dead_fraction.tolist() == [1, 1]
    assert t.table.fvu.tolist() == pytest.approx([(X.square().sum() / (X - X.mean(0)).square().sum()).item()] * 2, rel=1e-4)


def at(value, *index):
    x = X.clone()
    x[index] = value
    return x


@pytest.mark.parametrize("x, says", [
    (at(math.nan, 3, 5), r"hold 1 NaN or infinite values, the first at index \(3, 5\)"), (at(math.inf, slice(7, 9)), r"hold 16 .* index \(7, 0\)"),
    (at(-math.inf, 0, 0), r"index \(0, 0\)"), (torch.stack([X, at(math.nan, 2, 1)]), r"index \(1, 2, 1\)"),
    (X[:0], "none of them 0"), (X[:, :0], "none of them 0"), (X[:1], "one sample"), (torch.ones(9, 3), "constant: every sample is the same"),
    (torch.stack([X, X[:1].expand_as(X)]), r"constant in data set\(s\) \[1\]"), (X.half(), r"torch.float16: convert them with activations.float\(\)"),
    (X.bfloat16(), "bfloat16"), (X.long(), "int64"), (X > 0, "bool"), (X.tolist(), "must be a torch.Tensor, got list"), (X.numpy(), "got ndarray"),
    (X[0], r"shape \(samples, neurons\).*got \(8,\)"), (X[None, None], "got \\(1, 1, 400, 8\\)"), (None, "got NoneType")], ids=range(18))
def test_bad_activations(x, says):
    for f in (check_activations, fit):
        with pytest.raises(ValueError, match=says):
            f(x)


@pytest.mark.parametrize("config, seeds, says", [
    ([QUICK, replace(QUICK, expansion=2)], 1, "differ in l1 only"), ([QUICK, replace(QUICK, l1=.1, lr=.1)], 1, "differ in l1 only"),
    ([], 1, "not be empty"), (QUICK, 0, "not be empty"), (QUICK, [], "not be empty"), (QUICK, -1, "not be empty"),
    (replace(QUICK, kind="topk", k=25), 1, r"k must lie in 1..24")])
def test_bad_stacks(config, seeds, says):
    with pytest.raises(ValueError, match=says):
        fit(config=config, seeds=seeds)


def test_the_bar_moves_in_every_step(monkeypatch):
    "Also in a second search, which takes place where a code is crowded; never beyond its end."
    moves = []

    class Bar(nullcontext):
        def __enter__(self): return self
        def update(self, n): moves.append(n)

    totals = []
    monkeypatch.setattr(module, "progress_bar", lambda total, **_: totals.append(total) or Bar())
    counts = []
    for crowded in (math.inf, -1):
        monkeypatch.setattr(sparse_coding, "_CROWDED", crowded)
        monkeypatch.setattr(sparse_coding, "_PLAIN", -1)
        moves.clear()
        fit(config=replace(LASSO, grow=True), seeds=2)
        counts.append(sum(moves))
    first, both = counts
    assert both - first == 2 * LASSO.refine_steps and both <= totals[0] == totals[1]


# --- a known answer

@pytest.mark.parametrize("k", [32, 64])
def test_planted_features_are_counted(k):
    "As many features as neurons, and twice as many, found to 5% by the default setting."
    p = planted_activations(k, 32, 10_000)
    t = train_sae(p.activations, progress=False)
    assert t.table.converged.item()
    assert t.table.effective_features.item() == pytest.approx(p.effective_features, rel=.05)


def test_an_autoencoder_does_not_start_at_the_planted_answer():
    "Data and autoencoder of the same seed draw from different streams."
    for seed in range(4):
        directions = planted_activations(64, 32, 10, seed=seed).directions
        start = module._initial_rows(32, 256, SAEConfig(), torch.Generator().manual_seed(seed))
        assert (start @ directions.T).amax() < .9


def test_equal_seeds_are_refused():
    "They would count as independent repetitions."
    with pytest.raises(ValueError, match="seeds must differ"): fit(seeds=[0, 0])


def test_members_by_numpy_integers(monkeypatch):
    "As a table's row numbers come."
    sae = fit(seeds=2).sae
    assert sae[np.int64(1)].stack is None and sae[np.int64(1)].weight.equal(sae[1].weight) and sae[[1]].stack == 1


def test_saving_is_atomic(tmp_path, monkeypatch):
    "A write that fails leaves the file that was there, and no debris."
    sae = fit().sae
    sae.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="no space"): sae.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
