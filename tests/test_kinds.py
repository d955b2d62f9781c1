"""BatchTopK, JumpReLU, gated and Matryoshka autoencoders: codes, gradients against autograd, training, stacks, files, settings."""
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from superposition_lc.data import planted_activations
from superposition_lc.kinds import KINDS, PREFIXES, BatchTopK, Gated, JumpReLU, Matryoshka, batch_topk, kind_from_dict, kind_to_dict, make_kind
from superposition_lc.sae import SAEConfig, SparseAutoencoder, sae_gradients, sae_quality, train_sae

replace = dataclasses.replace
EACH = [BatchTopK(k=2), JumpReLU(), JumpReLU(bandwidth=.5), Gated(), Matryoshka(), Matryoshka(k=2, prefixes=(.25, .5, 1.))]
QUICK = SAEConfig(expansion=3, kind="relu", steps=40, max_rounds=2, warmup=10, batch_size=32, tied=False)
CONFIGS = [replace(QUICK, kind="batchtopk", k=3), replace(QUICK, kind="jumprelu"), replace(QUICK, kind="gated"), replace(QUICK, kind="matryoshka"),
           replace(QUICK, kind="matryoshka", k=3, tied=True), replace(QUICK, kind="jumprelu", tied=True), replace(QUICK, kind="gated", tied=True)]
NAMES = [f"{c.kind}{'' if c.k is None else c.k}{'-tied' if c.tied else ''}" for c in CONFIGS]
X = planted_activations(12, 8, 400).activations
each_kind = pytest.mark.parametrize("kind", EACH, ids=str)
each_config = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(kind, n=4, d=6, stack=None, tied=False, seed=0):
    "An autoencoder whose parameters, thresholds and scale are all random."
    sae, g = SparseAutoencoder(n, d, stack, tied=tied, kind=kind).double(), generator(seed)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    for b in sae.buffers():
        b.copy_(torch.rand(b.shape, generator=g, dtype=torch.float64) + .5)
    return sae


def samples(*shape, seed=7):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def fit(config, x=X, seeds=1):
    return train_sae(x, config, seeds, progress=False)


# --- gradients

class Step(torch.autograd.Function):
    "1[pre > t]; its derivative in t by the rectangle kernel, none in pre (Rajamanoharan et al. 2024b, Eq. 12)."
    @staticmethod
    def forward(ctx, pre, t, width):
        ctx.save_for_backward(pre, t); ctx.width = width
        return (pre > t).to(pre)

    @staticmethod
    def backward(ctx, g):
        pre, t = ctx.saved_tensors
        kernel = ((pre - t) / ctx.width).abs() < .5
        return None, (-g * kernel / ctx.width).sum_to_size(t.shape), None


class Jump(torch.autograd.Function):
    "pre 1[pre > t]; its derivative in t by the rectangle kernel (Eq. 11)."
    @staticmethod
    def forward(ctx, pre, t, width):
        ctx.save_for_backward(pre, t); ctx.width = width
        return pre * (pre > t)

    @staticmethod
    def backward(ctx, g):
        pre, t = ctx.saved_tensors
        kernel = ((pre - t) / ctx.width).abs() < .5
        return g * (pre > t), (-g * t * kernel / ctx.width).sum_to_size(t.shape), None


def reference_loss(sae, x, l1, weight):
    "The published losses, written for autograd, one member at a time."
    total = []
    for i in range(sae.stack):
        W, b = sae.weight[i], sae.bias[i]
        V, c = (W, x.new_zeros(x.shape[-1])) if sae.tied else (sae.decoder[i], sae.decoder_bias[i])
        h, price, kind = (x[i] - c) @ W.T, l1[i].squeeze(), sae.kind
        error = lambda z, V=V, c=c: (x[i] - z @ V - c).square().sum(-1).mean() * weight
        if isinstance(kind, JumpReLU):
            t = sae.log_threshold[i].exp().expand_as(b)
            loss = error(Jump.apply(h + b, t, kind.bandwidth)) + price * Step.apply(h + b, t, kind.bandwidth).sum(-1).mean()
        elif isinstance(kind, Gated):
            gate = (h + b).relu()
            z = (h + b > 0) * (sae.log_gain[i].exp() * h + sae.magnitude_bias[i]).relu()
            loss = error(z) + price * gate.sum(-1).mean() + error(gate, V.detach(), c.detach())
        else:
            z = (h + b).relu()
            if kind.k:
                stays = torch.zeros(z.numel(), dtype=torch.bool)
                stays[z.detach().flatten().sort(descending=True).indices[:kind.k * len(z)]] = True
                z = z * stays.view_as(z)
            prefixes = [error(z[:, :m], V[:m]) for m in kind.sizes(z.shape[1])]
            loss = sum(prefixes) / len(prefixes) + price * z.sum(-1).mean()
        total.append(loss)
    return torch.stack(total)


@settings(max_examples=60)
@given(kind=st.sampled_from(EACH), n=st.integers(1, 6), d=st.integers(2, 40), stack=st.integers(1, 3), tied=st.booleans(), batch=st.integers(1, 9),
       seed=st.integers(0, 2**31), l1=st.floats(0, 3), mean=st.booleans())
def test_gradients_equal_autograd(kind, n, d, stack, tied, batch, seed, l1, mean):
    sae, x = filled(kind, n, d, stack, tied, seed), samples(stack, batch, n, seed=seed + 1)
    weight, l1 = 1 / n if mean else 1., l1 * torch.rand(stack, 1, 1, generator=generator(1), dtype=torch.float64)
    grads, loss = sae_gradients(sae, x, l1, weight)
    expected = reference_loss(sae, x, l1, weight)
    expected.sum().backward()
    assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    assert grads.keys() == dict(sae.named_parameters()).keys()
    for name, p in sae.named_parameters():
        assert_close(grads[name], p.grad if p.grad is not None else torch.zeros_like(p), rtol=1e-6, atol=1e-6)


def test_one_prefix_is_the_relu_autoencoder():
    for tied in (True, False):
        plain, nested = SparseAutoencoder(4, 6, 2, tied=tied).double(), filled(Matryoshka(prefixes=(1.,)), stack=2, tied=tied)
        plain.load_state_dict(nested.state_dict())
        x, l1 = samples(2, 9, 4), torch.full((2, 1, 1), .3, dtype=torch.float64)
        (a, la), (b, lb) = sae_gradients(plain, x, l1), sae_gradients(nested, x, l1)
        assert_close(a, b); assert_close(la, lb)
        assert_close(plain(x), nested(x))


def test_kernel_gradient_of_a_threshold_is_that_of_the_expected_loss():
    "One feature, one neuron, normal samples: as the kernel narrows, the estimate approaches a finite difference of the mean loss."
    x, l1 = torch.special.ndtri((torch.arange(1_000_000).double() + .5) / 1_000_000).view(1, -1, 1), torch.full((1, 1, 1), .4).double()

    def at(theta, width):
        sae = filled(JumpReLU(bandwidth=width), 1, 1, 1, tied=True)
        sae.weight.data.fill_(1.); sae.bias.data.zero_(); sae.log_threshold.data.fill_(math.log(theta))
        grads, loss = sae_gradients(sae, x, l1)
        return grads["log_threshold"].item(), loss.item()
    for theta in (.4, .8, 1.2):
        slope = (at(theta * math.exp(.01), .1)[1] - at(theta * math.exp(-.01), .1)[1]) / .02
        errors = [abs(at(theta, width)[0] - slope) / abs(slope) for width in (.5, .1, .02)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < .02


# --- codes

@given(kind=st.sampled_from(EACH), stack=st.integers(1, 3), tied=st.booleans(), seed=st.integers(0, 1000), lead=st.lists(st.integers(1, 3), max_size=2))
def test_forward_is_decode_of_encode_and_members_agree(kind, stack, tied, seed, lead):
    sae = filled(kind, stack=stack, tied=tied, seed=seed)
    for s, x in [(sae, samples(5, 4)), (sae, samples(stack, 5, 4)), (sae[0], samples(*lead, 4))]:
        x_hat, z = s(x)
        assert torch.equal(z, s.encode(x)) and torch.equal(x_hat, s.decode(z)) and z.shape[-1] == 6 and (z >= 0).all()
    for i in range(stack):
        assert sae[i].kind == kind and sae[i].stack is None
        assert_close(sae[i].encode(samples(5, 4)), sae.encode(samples(5, 4))[i])


def test_topk_keeps_exactly_k():
    z = SparseAutoencoder(4, 40, k=3)
    z.bias.data.fill_(10.)
    assert ((z.encode(torch.randn(50, 4, generator=generator())) > 0).sum(-1) == 3).all()


@given(batch=st.integers(1, 12), d=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 1000))
def test_batch_topk_keeps_the_largest_of_a_batch(batch, d, k, seed):
    z = samples(2, batch, d, seed=seed).abs() + .1
    kept = batch_topk(z, k)
    assert ((kept > 0).sum((1, 2)) == batch * min(k, d)).all()  # k a sample on average
    assert ((kept == z) | (kept == 0)).all()
    for a, b in zip(z, kept):
        assert (b == 0).sum() == 0 or a[b == 0].max() <= b[b > 0].min()
    one, top = z[:, :1], z[:, :1].topk(min(k, d))  # a batch of one is TopK
    assert torch.equal(batch_topk(one, k), torch.zeros_like(one).scatter(-1, top.indices, top.values))


def test_batch_topk_gives_more_codes_to_fuller_samples():
    z = torch.tensor([[5., 4., 3.], [2., 1., 0.]])
    assert batch_topk(z, 2).tolist() == [[5., 4., 3.], [2., 0., 0.]]


def test_threshold_of_batchtopk_follows_the_smallest_code_that_stays():
    sae = filled(BatchTopK(k=2), 4, 20, 2)
    sae.threshold.zero_()
    least = []
    for seed in range(300):
        x = samples(2, 16, 4, seed=seed)
        sae_gradients(sae, x, torch.zeros(2, 1, 1).double())
        z = ((x - sae.decoder_bias[:, None]) @ sae.weight.mT + sae.bias[:, None]).relu()
        least.append(z.flatten(1).sort(descending=True).values[:, 31])
        if seed == 0: assert_close(sae.threshold, least[0])
    expected = least[0]
    for value in least[1:]: expected = .99 * expected + .01 * value
    assert_close(sae.threshold, expected)
    z = sae.encode(samples(100, 4) * sae.scale[0])
    assert z[z > 0].min() > sae.threshold.min()


def test_batchtopk_encodes_k_codes_on_average_after_training():
    "By its threshold, a sample at a time; the number differs between samples."
    p = planted_activations(32, 16, 4000, activity=.1)
    t = fit(SAEConfig(kind="batchtopk", k=3, l1=0, tied=False, steps=500, max_rounds=2), p.activations, seeds=2)
    assert t.table.l0.tolist() == pytest.approx([3, 3], rel=.1)
    counts = (t.sae.encode(p.activations[:500]) > 0).sum(-1)
    assert counts.float().std() > .5
    assert_close(t.sae.encode(p.activations[:1]), t.sae.encode(p.activations[:500])[:, :1], rtol=1e-4, atol=1e-4)


def test_jumprelu_codes_lie_above_their_thresholds_and_are_not_shrunk():
    sae = filled(JumpReLU(), d=50)
    x = samples(200, 4)
    pre = (x / sae.scale - sae.decoder_bias) @ sae.weight.T + sae.bias
    z, threshold = sae.encode(x), sae.log_threshold.exp()
    assert torch.equal(z > 0, pre > threshold)
    assert_close(z[z > 0], pre[z > 0])
    assert ((pre > 0) & (z == 0)).any()


def test_jumprelu_thresholds_start_at_the_bandwidth_and_rise_with_the_price():
    assert_close(SparseAutoencoder(4, 6, 2, kind=JumpReLU(bandwidth=.3)).log_threshold.exp(), torch.full((2, 6), .3))
    config = replace(QUICK, kind="jumprelu", steps=300)
    t = fit([replace(config, l1=v) for v in (.1, .5, 2.)], X)
    thresholds = t.sae.log_threshold.exp().mean(1)
    assert (thresholds.diff() > 0).all() and (t.table.l0.diff()[1:] < 0).all()


def test_gate_decides_the_support_and_magnitude_the_size():
    sae = filled(Gated(), d=50)
    sae.magnitude_bias.data.fill_(100.)  # magnitudes are all positive
    x = samples(200, 4)
    h = (x / sae.scale - sae.decoder_bias) @ sae.weight.T
    z = sae.encode(x)
    assert torch.equal(z > 0, h + sae.bias > 0)
    assert_close(z, (h + sae.bias > 0) * (sae.log_gain.exp() * h + 100.))
    sae.bias.data -= 1.
    fewer = sae.encode(x)
    assert (fewer > 0).sum() < (z > 0).sum() and torch.equal(fewer[fewer > 0], z[fewer > 0])  # what stays keeps its size


@pytest.mark.parametrize("stack", [None, 2])
def test_matryoshka_prefixes_decode_nested(stack):
    kind = Matryoshka(prefixes=(.1, .5, 1.))
    sae = filled(kind, d=20, stack=stack)
    z = sae.encode(samples(7, 4))
    parts = kind.reconstructions(sae, z)
    assert kind.sizes(20) == [2, 10, 20] and len(parts) == 3
    scale = sae.scale if stack is None else sae.scale.view(-1, 1, 1)
    V, c = sae.decoder, sae.decoder_bias if stack is None else sae.decoder_bias[:, None]
    for part, m in zip(parts, (2, 10, 20)):
        assert_close(part, (z[..., :m] @ V[..., :m, :] + c) * scale)
    assert_close(parts[-1], sae.decode(z))


def test_matryoshka_sizes():
    assert Matryoshka().sizes(256) == [8, 24, 56, 120, 256] and Matryoshka().sizes(3) == [1, 3] and PREFIXES[-1] == 1


def test_small_prefixes_of_a_matryoshka_explain_more_than_those_of_a_plain_one():
    p = planted_activations(32, 16, 3000, activity=.1, power=1)
    plain, nested = (fit(SAEConfig(kind="matryoshka", prefixes=f, steps=500, max_rounds=2, tied=False), p.activations) for f in ((1.,), PREFIXES))
    def unexplained(t):
        sae = t.sae[0]
        return [(p.activations - x).square().sum().item() for x in Matryoshka().reconstructions(sae, sae.encode(p.activations))]
    a, b = unexplained(plain), unexplained(nested)
    assert all(y < x for x, y in zip(a[:3], b[:3])) and b == sorted(b, reverse=True)


# --- training

@each_config
def test_learns(config):
    "The loss falls, codes are sparser than the dictionary, and the reconstruction beats the mean."
    t = fit(replace(config, steps=300), seeds=2)
    assert (t.table.fvu < .5).all() and (t.table.l0 < 12).all() and (t.table.effective_features > 3).all()
    assert (t.history.groupby("seed").loss.last() < t.history.groupby("seed").loss.first()).all()
    assert_close(torch.tensor(t.table.l0), sae_quality(t.sae, X)["l0"])


@each_config
def test_same_seed_same_table_and_global_state_untouched(config):
    state = torch.get_rng_state()
    a, b = fit(config, seeds=2), fit(config, seeds=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.table.equals(b.table) and a.history.equals(b.history)
    assert all(torch.equal(v, b.sae.state_dict()[k]) for k, v in a.sae.state_dict().items())
    assert not torch.allclose(a.sae.weight[0], a.sae.weight[1])


@each_config
def test_member_equals_the_same_autoencoder_alone(config):
    "In a stack of other seeds, prices and data."
    config, x = replace(config, tolerance=1e-12), torch.stack([X, 5 * X.roll(1, 1) + .1])
    alone = fit(config, x[1], seeds=[3])
    stack = fit([replace(config, l1=1.), config], x, seeds=[0, 3])
    assert stack.table[["data", "l1", "seed"]].values.tolist()[7] == [1, config.l1, 3]
    assert_close(stack.sae[7].state_dict(), alone.sae[0].state_dict(), rtol=1e-3, atol=1e-3)
    assert stack.table.effective_features[7] == pytest.approx(alone.table.effective_features[0], rel=1e-2)


@each_config
def test_members_that_are_done_leave_and_the_others_go_on(config):
    F = fit(replace(config, max_rounds=3, steps=30, tolerance=1e-12), seeds=3).history.pivot(index="seed", columns="step", values="effective_features").to_numpy()
    gaps = abs(F[:, 1] - F[:, 0]) / F[:, 0]
    tolerance = float(sorted(gaps)[0]) * (1 + 1e-6)  # one leaves after the second round
    t = fit(replace(config, max_rounds=3, steps=30, tolerance=tolerance), seeds=3)
    assert t.table.n_steps[int(gaps.argmin())] == 60 and t.table.n_steps.max() == 120
    for row in t.table.itertuples():
        assert row.effective_features == pytest.approx(F[row.seed][1 if row.n_steps == 60 else 2], rel=2e-2)


@each_config
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_units_of_the_network_change_nothing(config, factor):
    a, b = fit(config), fit(config, X * factor)
    assert b.table.effective_features.item() == pytest.approx(a.table.effective_features.item(), rel=1e-2)
    assert b.table.fvu.item() == pytest.approx(a.table.fvu.item(), rel=2e-2)


@each_config
def test_rows_stay_on_the_sphere(config):
    sae = fit(config, seeds=2).sae
    assert ((sae.weight if sae.tied else sae.decoder).norm(dim=-1) - 1).abs().max() < 1e-5


@each_config
def test_what_diverges_shows(config):
    "Absurd rates do not crash, and an encoder that is all NaN does not look as if nothing fired."
    t = fit(replace(config, lr=1e30), seeds=2)
    assert not ((t.table.fvu < .9) & t.table.converged).any()
    sae = fit(config).sae
    sae.weight.data.fill_(math.nan)
    assert sae.encode(X).isnan().all() and math.isnan(sae_quality(sae, X)["effective_features"].item())


@pytest.mark.parametrize("settings", [dict(kind="jumprelu", l1=.6), dict(kind="batchtopk", k=1, l1=0.)], ids=str)
def test_planted_features_are_found(settings):
    "As many features as neurons, by two kinds at a fixed setting."
    p = planted_activations(16, 16, 4000)
    t = fit(SAEConfig(tied=False, max_rounds=3, **settings), p.activations)
    best = (p.directions @ t.sae[0].decoder.T).amax(1)
    assert (best > .9).float().mean() > .8 and t.table.fvu.item() < .2


# --- files

@pytest.mark.parametrize("stack", [None, 1, 3])
@each_kind
def test_files_are_exact(tmp_path, stack, kind):
    for tied in (False, True):
        sae, path = filled(kind, stack=stack, tied=tied), tmp_path / "sae.safetensors"
        sae.save(path)
        back = SparseAutoencoder.load(path)
        assert back.kind == kind and (back.stack, back.tied) == (stack, tied)
        assert back.state_dict().keys() == sae.state_dict().keys()
        assert all(torch.equal(v, sae.state_dict()[k]) for k, v in back.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(back(samples(5, 4)), sae(samples(5, 4))))


@pytest.mark.parametrize("bad", [{"name": "gauted"}, {"name": "gated", "k": 3}, {}, {"name": "jumprelu"}, {"name": "batchtopk"}, {"name": "batchtopk", "k": 99}, "gated", ["gated"]], ids=str)
def test_files_whose_kind_does_not_fit(tmp_path, bad):
    path = tmp_path / "sae"
    filled(Gated()).save(path)
    with safe_open(path, "pt") as f:
        meta, state = json.loads(f.metadata()["sae"]), {k: f.get_tensor(k) for k in f.keys()}
    assert meta["kind"] == {"name": "gated"}
    save_file(state, path, metadata={"sae": json.dumps({**meta, "kind": bad})})
    with pytest.raises(ValueError, match="damaged"):
        SparseAutoencoder.load(path)


def test_files_of_plain_autoencoders_do_not_mention_kinds(tmp_path):
    SparseAutoencoder(4, 6).save(tmp_path / "sae")
    with safe_open(tmp_path / "sae", "pt") as f:
        assert "kind" not in json.loads(f.metadata()["sae"])


@each_kind
def test_kinds_as_dictionaries(kind):
    assert kind_from_dict(json.loads(json.dumps(kind_to_dict(kind)))) == kind
    assert kind_to_dict(None) is None and kind_from_dict(None) is None


# --- settings

def test_settings_reach_the_kind():
    assert make_kind("relu", k=3) is None and make_kind("topk", k=3) is None
    for config, kind in [(dict(kind="batchtopk", k=3), BatchTopK(k=3)), (dict(kind="jumprelu", bandwidth=.7), JumpReLU(bandwidth=.7)), (dict(kind="gated"), Gated()),
                         (dict(kind="matryoshka", prefixes=(.5, 1.)), Matryoshka(prefixes=(.5, 1.))), (dict(kind="matryoshka", k=2), Matryoshka(k=2))]:
        assert fit(replace(QUICK, steps=2, max_rounds=1, **config)).sae.kind == kind
    assert fit(replace(QUICK, steps=2, max_rounds=1)).sae.kind is None and set(KINDS) == {"batchtopk", "jumprelu", "gated", "matryoshka"}


BAD = [dict(k=None, kind="batchtopk"), dict(k=0, kind="batchtopk"), dict(k=2.5, kind="matryoshka"), dict(k=2, kind="gated"), dict(k=2, kind="jumprelu"),
       dict(kind="jumpreLU"), dict(bandwidth=0), dict(bandwidth=math.nan), dict(prefixes=()), dict(prefixes=(.5,)), dict(prefixes=(.5, .2, 1.)),
       dict(prefixes=(0., 1.)), dict(prefixes=[.5, 1.]), dict(prefixes=(.5, .5, 1.)), dict(prefixes=("a", 1.)), dict(unit_norm=False, tied=False, kind="gated")]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"SAEConfig.{next(iter(bad))} must be .*, got"):
        SAEConfig(**bad)


def test_a_kind_has_neither_lasso_nor_k_of_the_autoencoder():
    for bad in (dict(k=2), dict(lasso=True)):
        with pytest.raises(ValueError, match="kind"):
            SparseAutoencoder(4, 6, kind=Gated(), **bad)
    with pytest.raises(ValueError, match=r"k must lie in 1..6"):
        SparseAutoencoder(4, 6, kind=BatchTopK(k=7))
    with pytest.raises(ValueError, match="k must be an integer >= 1 for BatchTopK"):
        BatchTopK()
