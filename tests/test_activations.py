"""Capture: equal values, fair choice, nothing left behind, and bad input refused."""
import random
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from superposition_lc.activations import Activations, _Sampler, capture, find_layers, hooks


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(hidden=nn.Linear(6, 8), act=nn.ReLU(), drop=nn.Dropout(0.5), out=nn.Linear(8, 3)))


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3, padding=1), norm=nn.BatchNorm2d(4), act=nn.ReLU(),
                                     pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), out=nn.Linear(4, 3)))


class Wrap(nn.Module):
    "One layer, `inner`, whose output is changed by `fn`; the result is of no interest."
    def __init__(self, fn):
        super().__init__()
        self.inner = Inner(fn)

    def forward(self, x):
        self.inner(x)
        return x


class Inner(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(20, 1, 5, 4, generator=torch.Generator().manual_seed(1))


def n_hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


# --- values

def test_equals_a_loop_over_samples(mlp):
    acts = capture(mlp, X, ["hidden", "act", "out"], batch_size=7)
    mlp.eval()
    with torch.no_grad():
        for name, upto in [("hidden", 1), ("act", 2), ("out", 4)]:
            naive = torch.stack([mlp[:upto](x[None])[0] for x in X])
            torch.testing.assert_close(acts[name].values, naive)
            assert acts[name].clusters.tolist() == list(range(50))
    assert list(acts) == ["hidden", "act", "out"]


def test_result(mlp):
    act = capture(mlp, X, "hidden")["hidden"]
    assert isinstance(act, Activations) and len(act) == 50 and act.n_neurons == 8
    assert act.values.dtype == torch.float32 and act.clusters.dtype == torch.int64
    assert repr(act) == "Activations(50 samples of 8 neurons, 50 clusters)"
    assert not act.values.requires_grad and not act.values.is_inference()
    nn.Linear(8, 1)(act.values).sum().backward()  # one can train on it


def test_convolution_positions_and_clusters(cnn):
    acts = capture(cnn, IMAGES, ["conv", "out"], batch_size=6)
    cnn.eval()
    for i, image in enumerate(IMAGES):
        maps = cnn.conv(image[None])[0].detach()
        mine = acts["conv"].values[acts["conv"].clusters == i].reshape(5, 4, 4)
        torch.testing.assert_close(mine, maps.permute(1, 2, 0))
    assert len(acts["conv"]) == 20 * 5 * 4 and acts["out"].values.shape == (20, 3)


def test_volumes():
    acts = capture(nn.Sequential(nn.Conv3d(1, 6, 2)), torch.rand(2, 1, 3, 3, 3), "0")["0"]
    assert acts.values.shape == (2 * 8, 6)


def test_linear_on_images_has_neurons_last():
    acts = capture(nn.Sequential(nn.Linear(4, 7)), torch.rand(2, 5, 3, 4), "0")["0"]
    assert acts.values.shape == (2 * 15, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(mlp, dtype):
    act = capture(mlp.to(dtype), X.to(dtype), "hidden")["hidden"]
    assert act.values.dtype == torch.float32
    torch.testing.assert_close(act.values, mlp.hidden(X.to(dtype)).detach().float())


def test_in_place_after_the_layer():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True))
    acts = capture(model, X, ["0", "1"])
    assert (acts["0"].values < 0).any()
    torch.testing.assert_close(acts["0"].values.relu(), acts["1"].values)


def test_module_in_place_of_a_name(mlp):
    assert list(capture(mlp, X, mlp.act)) == ["act"]
    assert list(capture(mlp, X, [mlp.act, "out"])) == ["act", "out"]
    assert capture(mlp, X, "")[""].values.shape == (50, 3)  # the network itself


def test_batches_whose_sizes_and_images_change(cnn):
    batches = [torch.rand(3, 1, 5, 4), torch.rand(1, 1, 8, 8), torch.rand(7, 1, 2, 2)]
    act = capture(cnn, batches, "act")["act"]
    assert act.clusters.bincount().tolist() == [20] * 3 + [64] + [4] * 7


# --- forms of batches

def test_forms_of_batches(mlp):
    expected = capture(mlp, X, "act")["act"].values
    labels = torch.arange(50)
    for batches in [DataLoader(TensorDataset(X, labels), batch_size=8), DataLoader(TensorDataset(X), batch_size=50),
                    DataLoader([x for x in X], batch_size=9), [(X[:10], labels[:10]), [X[10:], labels[10:]]], iter(X.split(13)),
                    [{"input": X[:20]}, {"input": X[20:]}], {"input": X}, [({"input": X}, labels)]]:
        torch.testing.assert_close(capture(mlp, batches, "act")["act"].values, expected)


def test_iterable_dataset(mlp):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(X.split(10))
    assert len(capture(mlp, Stream(), "act")["act"]) == 50


@pytest.mark.parametrize("bad", [3, X.numpy(), "images", TensorDataset(X), [3], [None], [[]], ["text"], [{"a": 1}], {"a": 1}, [torch.tensor(1.)],
                                 torch.tensor(1.)])
def test_not_batches(mlp, bad):
    with pytest.raises(TypeError, match="found .*, expected a tensor"):
        capture(mlp, bad, "act")


@pytest.mark.parametrize("bad, says", [([], "no samples"), (iter([]), "no samples"), (X[:0], "batch 0 is empty"), ([X, X[:0]], "batch 1 is empty"),
                                       ({"input": X[:0]}, "batch 0 is empty")])
def test_no_samples(mlp, bad, says):
    with pytest.raises(ValueError, match=says):
        capture(mlp, bad, "act")


def test_shuffled_loader_is_seeded(mlp):
    loader = DataLoader(TensorDataset(X), batch_size=8, shuffle=True)
    a, b, c = (capture(mlp, loader, "act", seed=s)["act"].values for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# --- outputs

@dataclass
class Output:
    ids: torch.Tensor
    hidden: tuple


@pytest.mark.parametrize("form", [
    lambda x: (x, x * 2), lambda x: [x.long(), x], lambda x: {"ids": x.long(), "hidden": x}, lambda x: OrderedDict(a=None, b=((x,), 3)),
    lambda x: Output(x.long(), ("text", x)), lambda x: (None, {"a": x})])
def test_outputs_that_are_not_tensors(form):
    torch.testing.assert_close(capture(Wrap(form), X, "inner")["inner"].values, X)


@pytest.mark.parametrize("form, found", [(lambda x: x.long(), "a tensor of torch.int64"), (lambda x: (x > 0, 3), "a tuple without one"),
                                         (lambda x: None, "a NoneType"), (lambda x: x.to(torch.complex64), "a tensor of torch.complex64")])
def test_outputs_without_numbers(form, found):
    with pytest.raises(ValueError, match=f"layer 'inner': found {found}.*expected a floating-point tensor"):
        capture(Wrap(form), X, "inner")


@pytest.mark.parametrize("form, says", [(lambda x: x.sum(), "shape"), (lambda x: x.sum(1), "shape"), (lambda x: x.repeat(2, 1), "100 rows for 50 inputs")])
def test_outputs_of_no_use(form, says):
    with pytest.raises(ValueError, match=f"layer 'inner': .*{says}"):
        capture(Wrap(form), X, "inner")


def test_time_first_recurrence_is_refused():
    lstm = nn.Sequential(nn.LSTM(6, 4))
    assert capture(nn.Sequential(nn.LSTM(6, 4, batch_first=True)), torch.rand(3, 5, 6), "0")["0"].values.shape == (15, 4)
    with pytest.raises(ValueError, match="5 rows for 3 inputs.*batch_first"):
        capture(Wrap(lambda x: lstm(x.transpose(0, 1))), torch.rand(3, 5, 6), "inner")


# --- which axis holds the neurons

def test_one_dimensional_convolution():
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
    x = torch.rand(4, 2, 9)
    for name in ("0", "1"):
        assert capture(model, x, name)[name].values.shape == (4 * 7, 8)
    with pytest.raises(ValueError, match=r"layer '2': .*pass channel_dim=\{'2': 1\} or \{'2': -1\}"):
        capture(model, x, "2")
    acts = capture(model, x, ["1", "2"], channel_dim={"2": 1})
    torch.testing.assert_close(acts["2"].values, acts["1"].values.relu())
    assert capture(model, x, "2", channel_dim=-1)["2"].values.shape == (4 * 8, 7)


@pytest.mark.parametrize("dim", [0, 4, -4, -5])
def test_channel_dim_out_of_range(cnn, dim):
    with pytest.raises(ValueError, match=f"channel_dim={dim} does not fit"):
        capture(cnn, IMAGES, "conv", channel_dim=dim)


def test_channel_dim_for_an_unknown_layer(cnn):
    with pytest.raises(ValueError, match="channel_dim: .*'norm'"):
        capture(cnn, IMAGES, "conv", channel_dim={"norm": 1})


def test_number_of_neurons_changes():
    with pytest.raises(ValueError, match="layer 'inner': 6 neurons before, 5 in later batches"):
        capture(Wrap(lambda x: x), [X, X[:, :5]], "inner")


# --- tokens and padding

class Toy(nn.Module):
    "Called by keyword, with a mask; returns a dict, as Hugging Face models do."
    def __init__(self):
        super().__init__()
        self.embed, self.act, self.head = nn.Embedding(20, 5), nn.Tanh(), nn.Linear(5, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.act(self.embed(input_ids))
        return {"hidden": hidden, "logits": self.head(hidden.mean(1))}


def padded(texts, length, left=False):
    "The texts as a batch padded to `length`, on the right or the left."
    fill = lambda t, v: [v] * (length - len(t)) + t if left else t + [v] * (length - len(t))
    return {"input_ids": torch.tensor([fill(t, 0) for t in texts]), "attention_mask": torch.tensor([fill([1] * len(t), 0) for t in texts])}


TEXTS = [[int(t) for t in np.random.default_rng(i).integers(1, 20, i % 7 + 1)] for i in range(30)]


def test_padding_is_left_out():
    toy = Toy()
    acts = capture(toy, [padded(TEXTS[:4], 7), padded(TEXTS[4:6], 9, left=True)], ["act", "head"])
    assert acts["act"].clusters.tolist() == [i for i in range(6) for _ in TEXTS[i]]
    torch.testing.assert_close(acts["act"].values, toy.embed(torch.tensor(sum(TEXTS[:6], []))).tanh().detach())
    assert acts["head"].values.shape == (6, 2)  # one a text: nothing to leave out
    assert len(capture(toy, padded(TEXTS[:4], 7), "act", mask=None)["act"]) == 28


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_mask_types(dtype):
    batch = padded(TEXTS[:4], 7)
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    assert len(capture(Toy(), [batch], "act")["act"]) == sum(map(len, TEXTS[:4]))


def test_mask_that_does_not_fit():
    batch = padded(TEXTS[:4], 7)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(4, 6\) does not fit positions \(4, 7\).*mask=None"):
        capture(Toy(), [{**batch, "attention_mask": batch["attention_mask"][:, 1:]}], "act")


def test_nothing_but_padding():
    batch = padded(TEXTS[:4], 7)
    with pytest.raises(ValueError, match="no samples.*padding"):
        capture(Toy(), [{**batch, "attention_mask": batch["attention_mask"] * 0}], "act")


def test_nan_in_padding_does_not_matter():
    class Half(Toy):
        def forward(self, input_ids, attention_mask):
            return self.act(self.embed(input_ids).masked_fill(attention_mask[..., None] == 0, torch.nan))
    assert len(capture(Half(), padded(TEXTS[:4], 7), "act")["act"]) == sum(map(len, TEXTS[:4]))


def test_choice_does_not_depend_on_padding_or_batches():
    toy = Toy()
    one = capture(toy, padded(TEXTS, 12), "act", max_samples=40)["act"]
    two = capture(toy, [padded(TEXTS[i:i + 4], 7 + i, left=i % 8 == 0) for i in range(0, 30, 4)], "act", max_samples=40)["act"]
    assert torch.equal(one.values, two.values) and torch.equal(one.clusters, two.clusters)


# --- the choice of samples

@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=30), cap=st.integers(1, 80), seed=st.integers(-5, 2**64))
def test_choice_does_not_depend_on_the_cuts(cuts, cap, seed):
    x = torch.arange(sum(cuts) * 3.).reshape(-1, 3, 1)
    whole, pieces, start = _Sampler("x", cap, seed), _Sampler("x", cap, seed), 0
    whole.add(x, 0)
    for n in cuts:
        pieces.add(x[start:start + n], start)
        start += n
        assert pieces.n_kept <= 2 * cap  # bounded memory
    a, b = whole.join(), pieces.join()
    assert torch.equal(a.values, b.values) and torch.equal(a.clusters, b.clusters)
    assert len(a) == min(cap, len(x) * 3) and (a.values[:, 0].diff() > 0).all()  # in order, none twice
    assert torch.equal(a.clusters, a.values[:, 0].long() // 3)


def test_choice_is_the_same_in_layers_of_the_same_shape(cnn):
    acts = capture(cnn.eval(), IMAGES, ["norm", "act"], max_samples=100, batch_size=3)
    torch.testing.assert_close(acts["norm"].values.relu(), acts["act"].values)
    assert torch.equal(acts["norm"].clusters, acts["act"].clusters) and len(acts["act"]) == 100


def test_choice_depends_on_the_seed(cnn):
    a, b, c = (capture(cnn, IMAGES, "act", max_samples=100, seed=s)["act"].clusters for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_cap_above_the_number_of_samples(mlp):
    assert torch.equal(capture(mlp, X, "act", max_samples=1000)["act"].values, capture(mlp, X, "act")["act"].values)
    assert torch.equal(capture(mlp, X, "act", max_samples=50)["act"].values, capture(mlp, X, "act")["act"].values)


def test_every_sample_has_the_same_chance():
    "Chi-square over 40 inputs of 5 positions; 400 choices of 20."
    x, counts = torch.arange(200.).reshape(40, 5, 1), np.zeros(200)
    for seed in range(400):
        sampler = _Sampler("x", 20, seed)
        sampler.add(x, 0)
        counts[sampler.join().values[:, 0].long()] += 1
    chi2 = ((counts - 40) ** 2 / (40 * 0.9)).sum()
    assert abs(chi2 - 199) < 4 * (2 * 199) ** 0.5


@pytest.mark.parametrize("bad", [dict(max_samples=0), dict(batch_size=0)])
def test_bad_numbers(mlp, bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        capture(mlp, X, "act", **bad)


# --- stopping

def test_stops_after_the_last_wanted_layer(mlp):
    calls = {}
    with hooks(dict(mlp.named_children()), lambda name, *_: calls.update({name: calls.get(name, 0) + 1})):
        capture(mlp, X, ["act", "hidden"], batch_size=10)
        assert calls == {"hidden": 5, "act": 5, "drop": 1, "out": 1}  # the first batch runs in full
        calls.clear()
        capture(mlp, X, ["hidden", "out"], batch_size=10)
        assert calls == dict.fromkeys(["hidden", "act", "drop", "out"], 5)


def test_stops_through_a_networks_own_except():
    class Careful(Wrap):
        def forward(self, x):
            try:
                self.inner(x)
            except Exception:
                raise AssertionError("swallowed")
    assert len(capture(Careful(lambda x: x), X, "inner", batch_size=10)["inner"]) == 50


# --- layers

@pytest.mark.parametrize("name, says", [("hiden", "did you mean 'hidden'"), ("layers.9.zz", "it has 'hidden', 'act', 'drop', 'out'"), (7, "no layer 7")])
def test_unknown_layer(mlp, name, says):
    with pytest.raises(KeyError, match=says):
        capture(mlp, X, name)
    with pytest.raises(KeyError, match=says):
        find_layers(mlp, ["act", name])


def test_module_of_another_network(mlp):
    with pytest.raises(KeyError, match="the model has no layer the ReLU given"):
        capture(mlp, X, nn.ReLU())


def test_no_layer(mlp):
    with pytest.raises(ValueError, match="no layer asked for"):
        capture(mlp, X, [])


def test_layer_called_twice():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 6), relu, nn.Linear(6, 6), relu)
    for name in ("1", "3"):  # one module under two names
        with pytest.raises(ValueError, match=f"layer '{name}' is called more than once"):
            capture(model, X, name)
    assert len(capture(model, X, "2")["2"]) == 50  # the others are not concerned


def test_shared_weights_in_two_modules():
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight, b.bias = a.weight, a.bias
    acts = capture(nn.Sequential(a, nn.ReLU(), b), X, ["0", "2"])
    assert not torch.equal(acts["0"].values, acts["2"].values)


def test_two_names_of_one_module():
    model = Wrap(lambda x: x)
    model.other = model.inner
    acts = capture(model, X, ["inner", "other"], batch_size=20)
    assert torch.equal(acts["inner"].values, acts["other"].values)


def test_layer_that_is_never_called(mlp):
    mlp.spare = nn.Linear(3, 3)
    model = Wrap(lambda x: mlp[:2](x))
    model.used, model.spare = mlp, nn.Linear(2, 2)
    with pytest.raises(ValueError, match="batch 0 did not call 'spare', 'used'. Fix: choose among those it calls: 'used.hidden', 'used.act', 'inner'"):
        capture(model, X, ["inner", "spare", "used"])
    assert n_hooks(model) == 0


def test_layer_that_is_called_for_some_batches_only():
    class Moody(Wrap):
        def forward(self, x):
            return self.inner(x) if len(x) > 10 else x
    with pytest.raises(ValueError, match="batch 2 did not call 'inner'"):
        capture(Moody(lambda x: x), X[:45], "inner", batch_size=20)


def test_attention_in_evaluation_mode():
    "PyTorch's fused path, which skips the parts of a transformer layer, gives way to hooks."
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    acts = capture(model, torch.rand(10, 3, 8), ["layers.0.linear1", "layers.1.self_attn", "layers.1"], batch_size=4)
    assert [a.values.shape for a in acts.values()] == [(30, 16), (30, 8), (30, 8)]


# --- NaN

@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cap", [None, 1])
def test_nan(mlp, value, cap):
    x = X.clone()
    x[33, 2] = value
    with pytest.raises(ValueError, match="layer 'hidden': 8 of 80 activations of a batch are NaN or infinite, the first in input 33, neuron 0"):
        capture(mlp, x, "hidden", max_samples=cap, batch_size=10)
    assert n_hooks(mlp) == 0


def test_too_large_for_float32():
    with pytest.raises(ValueError, match="NaN or infinite"):
        capture(Wrap(lambda x: x.double() * 1e300), X, "inner")


# --- nothing left behind

def test_hooks_are_removed(mlp):
    capture(mlp, X, ["act", "out"], batch_size=10)
    assert n_hooks(mlp) == 0
    with pytest.raises(ValueError, match=r"(?s)batch 1 \(inputs \(\d+, 4\) torch.float32\).*shapes.*Fix"):
        capture(mlp, [X, X[:, :4]], "act")  # the wrong number of inputs
    assert n_hooks(mlp) == 0
    with pytest.raises(KeyboardInterrupt):
        with hooks({"a": mlp.act}, lambda *_: None):
            raise KeyboardInterrupt
    assert n_hooks(mlp) == 0


def test_inputs_of_another_type_are_named_and_lack_of_memory_stays_what_it_is(mlp):
    with pytest.raises(ValueError, match=r"(?s)batch 0 \(inputs .*torch.float16\).*dtype"): capture(mlp, X.half(), "act")
    def full(x): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="out of memory"): capture(Wrap(full), X, "inner")


def test_other_peoples_hooks_stay(mlp):
    mlp.act.register_forward_hook(lambda m, a, out: out + 1)
    acts = capture(mlp, X, ["act"])
    assert acts["act"].values.min() >= 1 and n_hooks(mlp) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_gradients_are_restored(cnn, fails):
    cnn.train()
    cnn.norm.eval()  # a frozen batch norm in a network that trains
    cnn.out.weight.requires_grad_(False)
    before = {name: m.training for name, m in cnn.named_modules()}
    state = {name: t.clone() for name, t in cnn.state_dict().items()}
    batches = [IMAGES, torch.zeros(2, 3)] if fails else [IMAGES]
    try:
        capture(cnn, batches, "act")
    except (RuntimeError, ValueError):
        assert fails
    else:
        assert not fails
    assert {name: m.training for name, m in cnn.named_modules()} == before
    assert all(torch.equal(t, state[name]) for name, t in cnn.state_dict().items())
    assert torch.is_grad_enabled() and all(p.grad is None for p in cnn.parameters())
    assert cnn.conv.weight.requires_grad and not cnn.out.weight.requires_grad


def test_runs_in_evaluation_mode(cnn, mlp):
    cnn.train()
    capture(cnn, IMAGES, "out")
    assert cnn.norm.num_batches_tracked == 0
    mlp.train()
    assert torch.equal(capture(mlp, X, "out")["out"].values, capture(mlp.eval(), X, "out")["out"].values)  # no dropout


def test_random_numbers_are_left_alone():
    noisy = Wrap(lambda x: x + torch.randn_like(x))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = DataLoader(TensorDataset(X), batch_size=8, shuffle=True)
    a, b, c = (capture(noisy, loader, "inner", max_samples=9, seed=s)["inner"].values for s in (0, 0, 1))
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
    assert torch.equal(a, b) and not torch.equal(a, c)  # and what the network draws has our seed


def test_a_buffer_made_on_the_way_can_be_trained_with():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.table = nn.Linear(6, 6), None

        def forward(self, x):
            if self.table is None:
                self.table = x.new_ones(6) * 2
            return self.linear(x) * self.table
    model = Cache()
    capture(model, X, "linear")
    model(X).sum().backward()


def test_network_without_parameters():
    assert len(capture(nn.Sequential(nn.Flatten(), nn.ReLU()), IMAGES, "1")["1"]) == 20


def test_device(mlp):
    assert len(capture(mlp, X, "act", device="cpu")["act"]) == 50
    home = mlp.hidden.weight.device
    with pytest.raises(ValueError, match="spread over"):
        mlp.out.to("meta")
        capture(mlp, X, "act", device="cpu")
    assert mlp.hidden.weight.device == home


def test_network_is_taken_back_where_it_was():
    "The only other device there always is, meta, loses the weights: so the moves are noted and not made."
    class Moves(nn.Linear):
        def to(self, device):
            moves.append(str(device))
            return self
    moves, model = [], Moves(6, 2)
    with pytest.raises(Exception):
        capture(model, X, "", device="meta")
    assert moves == ["meta", "cpu"] and n_hooks(model) == 0
    capture(model, X, "", device="cpu")
    assert len(moves) == 2  # it was there already


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(cnn):
    on_cpu = capture(cnn, IMAGES, ["act", "out"], max_samples=50)
    state = torch.cuda.get_rng_state()
    on_gpu = capture(cnn, IMAGES, ["act", "out"], max_samples=50, device="cuda")
    assert next(cnn.parameters()).device.type == "cpu" and torch.equal(state, torch.cuda.get_rng_state())
    where_it_is = capture(cnn.cuda(), IMAGES, ["act", "out"], max_samples=50)
    for name in on_cpu:
        assert on_gpu[name].values.device.type == "cpu" and torch.equal(on_gpu[name].clusters, on_cpu[name].clusters)
        torch.testing.assert_close(on_gpu[name].values, on_cpu[name].values, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(where_it_is[name].values, on_gpu[name].values)
    assert next(cnn.parameters()).device.type == "cuda"


def test_progress_is_silent_when_quick_or_asked(mlp, capsys):
    capture(mlp, X, "act")
    capture(mlp, X, "act", progress=False)
    assert capsys.readouterr() == ("", "")
