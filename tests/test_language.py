"""Language models: sites, text, the pass over it and its faults, the experiment."""
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from superposition_lc import text as module
from superposition_lc.activations import hooks, sample_keys
from superposition_lc.entropy import ShareAccumulator
from superposition_lc.geometry import tame
from superposition_lc.pretrained import export_sae, load_sae
from superposition_lc.sae import SAEConfig, SparseAutoencoder, sae_quality, train_sae
from superposition_lc.text import Tamed, TextMeasurement, find_sites, load_language_model, measure_text, read_texts, residual_error, text_batches

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing about language models is tested")
transformers.utils.logging.disable_progress_bar()
from superposition_lc.experiments import language  # noqa: E402
from superposition_lc.experiments.language import SCALES, LanguageConfig, load_site_saes, load_text, make_model, plot_convergence, plot_layers, published, reading, report, run, train_tokenizer  # noqa: E402

VOCAB, WIDTH = 300, 16
NEOX = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
SETTINGS = dict(max_tokens=12, windows=3, batch_size=3, n_groups=7, test_every=2, progress=False)


class Words:
    "A tokenizer of words, called as transformers' are; `around` adds a first and a last token."
    pad_token_id, all_special_ids = None, [1, 2]

    def __init__(self, around=False): self.around = around

    def __call__(self, text, **kwargs):
        ids = [3 + sum(map(ord, w)) % (VOCAB - 3) if w != "<end>" else 2 for w in text.split()]
        mask = [0] * len(ids)
        if self.around: ids, mask = [1, *ids, 2], [1, *mask, 1]
        return dict(input_ids=ids, special_tokens_mask=mask)


def neox(seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**(NEOX | changes))).eval()


def texts(n=20, seed=0):
    "Documents of 5 to 45 random words."
    g = np.random.default_rng(seed)
    return [" ".join("w" * int(k) for k in g.integers(1, 60, g.integers(5, 46))) for _ in range(n)]


@pytest.fixture(scope="module")
def model(): return neox()


def random_sae(seed=0, n=WIDTH, d=40, stack=2):
    "Axes of a random basis, both signs, and a few more rows: a good reconstruction, and each member another one."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SparseAutoencoder(n, d, stack)
        basis = torch.linalg.qr(torch.randn(*(() if stack is None else (stack,)), n, n)).Q
    sae.weight.data = torch.cat([basis, -basis, .2 * sae.weight.data[..., 2 * n:, :]], -2)
    sae.bias.data -= .1
    sae.scale.fill_(.02)  # about the size of activations at initialisation
    return sae


@pytest.fixture(scope="module")
def saes(): return {name: random_sae(i) for i, name in enumerate(("embed", "attn_out_layer0", "mlp_out_layer1", "resid_out_layer1"))}


@pytest.fixture(scope="module")
def whole(model, saes): return measure_text(model, Words(), texts(), saes, **SETTINGS)


def same(a, b):
    "Bit for bit: shares, tables, dimensions, curves."
    for name in a._sums:
        for x, y in zip(a._sums[name].shares, b._sums[name].shares): assert torch.equal(x._sums, y._sums) and x._ids == y._ids
        for k, v in a._sums[name].sums.items(): assert torch.equal(v, b._sums[name].sums[k]), k
    for read in (lambda m: m.measurement().table, lambda m: m.measurement().per_seed, lambda m: m.dimensions(), lambda m: m.curve()):
        pd.testing.assert_frame_equal(read(a), read(b), check_exact=True)


# --- sites

OTHERS = dict(
    gpt2=lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)),
    llama=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)),
    mistral=lambda: transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32)),
    serial=lambda: neox(use_parallel_residual=False), neox=neox)


@pytest.mark.parametrize("family", OTHERS)
def test_sites_and_the_residual_identity(family):
    net = OTHERS[family]().eval()
    sites = find_sites(net)
    assert [s.name for s in sites] == ["embed"] + [f"{k}_out_layer{i}" for i in range(2) for k in ("attn", "mlp", "resid")]
    assert [s.depth for s in sites] == [0, 1, 1, 1, 2, 2, 2]
    ids = torch.arange(40).view(2, 20)
    assert residual_error(net, dict(input_ids=ids)) < 1e-5
    assert [s.name for s in find_sites(net.base_model)] == [s.name for s in sites], "with and without the head"


def test_sites_of_bert_are_before_the_sum():
    net = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)).eval()
    seen, paths = {}, dict(net.named_modules())
    sites = {s.name: paths[s.module] for s in find_sites(net)}
    with hooks(sites, lambda name, _, out: seen.setdefault(name, out[0] if isinstance(out, tuple) else out)), torch.no_grad():
        net(input_ids=torch.arange(20)[None])
    layer = net.encoder.layer[0]
    middle = layer.attention.output.LayerNorm(seen["attn_out_layer0"] + seen["embed"])
    assert torch.allclose(layer.output.LayerNorm(seen["mlp_out_layer0"] + middle), seen["resid_out_layer0"], atol=1e-6)
    assert math.isnan(residual_error(net, dict(input_ids=torch.arange(20)[None])))


def test_a_broken_identity_is_seen_and_told(model, saes):
    class Off(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
        def forward(self, *args, **kwargs): return self.inner(*args, **kwargs) * 1.5
    net = neox()
    layer = net.gpt_neox.layers[1]
    layer.post_mlp_dropout = Off(layer.post_mlp_dropout)  # what is added is not what the MLP returned
    assert residual_error(net, dict(input_ids=torch.arange(20)[None])) > .01
    m = measure_text(net, Words(), texts(), saes, **SETTINGS)
    warned = m.measurement().table.set_index("layer").warning.str.contains("blocks do not add")
    assert warned["mlp_out_layer1"] and warned["resid_out_layer1"] and not warned["embed"]


def test_sites_by_kind_path_and_name(model):
    assert [s.name for s in find_sites(model, "mlp")] == ["mlp_out_layer0", "mlp_out_layer1"]
    assert find_sites(model, "gpt_neox.layers.0")[0].name == "resid_out_layer0"
    other = find_sites(model, "gpt_neox.layers.0.mlp.act")[0]
    assert (other.name, other.kind, other.depth) == ("gpt_neox.layers.0.mlp.act", "other", -1)


@pytest.mark.parametrize("wanted, error, says", [("mlp_out_layer2", KeyError, "did you mean 'mlp_out_layer"), ("§", KeyError, "it has 'embed'"), ([], ValueError, "no site asked for")])
def test_unknown_sites_are_refused(model, wanted, error, says):
    with pytest.raises(error, match=says): find_sites(model, wanted)


def test_an_unknown_family_needs_paths():
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="name them"): find_sites(net)
    assert find_sites(net, "0")[0].kind == "other"


# --- text

def test_text_from_files_folders_lists_and_rows(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n\n \n\nthree", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "four"}\n\n{"text": "five", "n": 1}\n', encoding="utf-8")
    (tmp_path / "c.bin").write_text("not text")
    assert list(read_texts(tmp_path / "b.txt")) == ["one", "two", "three"]
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == ["four", "five"]
    assert list(read_texts(tmp_path)) == ["four", "five", "one\n\ntwo\n\n \n\nthree"]
    assert list(read_texts(tmp_path / "b.txt", None)) == ["one\n\ntwo\n\n \n\nthree"]
    assert list(read_texts(iter([{"text": "a"}, "b", ""]))) == ["a", "b"]


@pytest.mark.parametrize("source, says", [([], "no text"), (["", " \n"], "no text"), ("no such file", r"pass a list"), ([3], "document 0 is a int"), ([{"words": "a"}], '"text"'), (7, "path or an iterable"), (None, "path or an iterable")])
def test_what_is_no_text_is_refused(source, says):
    with pytest.raises(ValueError, match=says): list(read_texts(source))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no .txt"): list(read_texts(tmp_path))


@pytest.mark.parametrize("around, special", [(False, False), (True, False), (True, True)])
def test_batches_hold_every_token_once(around, special):
    documents, tok = texts(), Words(around)
    seen = {}
    for b in text_batches(documents, tok, max_tokens=12, windows=99, batch_size=3, n_groups=7, special=special):
        assert len(b.documents) <= 3 and (b.documents % 7 == b.group).all() and b.input_ids.shape[1] <= 12
        assert (b.attention_mask | ~b.keep).all(), "padding is never a sample"
        for ids, keep, doc, start in zip(b.input_ids, b.keep, b.documents.tolist(), b.starts.tolist()): seen.setdefault(doc, {})[start] = ids[keep].tolist()
    for doc, text in enumerate(documents):
        want, found = Words()(text)["input_ids"], [t for _, ids in sorted(seen[doc].items()) for t in ids]
        assert [t for t in found if t not in (1, 2)] == want
        assert ((1 in found) and (2 in found)) == special


def test_windows_and_documents_are_limited():
    batches = list(text_batches(texts(), Words(), 12, 1, 3, 7, max_documents=9))
    assert sorted(d for b in batches for d in b.documents.tolist()) == list(range(9))
    first = {d: ids[k].tolist() for b in batches for d, ids, k in zip(b.documents.tolist(), b.input_ids, b.keep)}
    assert all(first[d] == Words()(t)["input_ids"][:12] for d, t in enumerate(texts()[:9]))


def test_a_special_token_inside_a_text_is_no_sample():
    b, = text_batches(["a b <end> c"], Words())
    assert b.keep.tolist() == [[True, True, False, True]]


def test_shards_are_parts_of_the_same_batches():
    whole = [b.input_ids.tolist() for b in text_batches(texts(), Words(), 12, 3, 3, 7)]
    parts = [b.input_ids.tolist() for i in range(3) for b in text_batches(texts(), Words(), 12, 3, 3, 7, (i, 3))]
    assert sorted(whole) == sorted(parts)


@pytest.mark.parametrize("bad, says", [(dict(max_tokens=0), "max_tokens must"), (dict(windows=0), "windows must"), (dict(batch_size=0), "batch_size must"), (dict(shard=(2, 2)), "shard must"), (dict(shard=(-1, 2)), "shard must"), (dict(n_groups=3, shard=(0, 4)), "shard must")])
def test_bad_batches_are_refused(bad, says):
    with pytest.raises(ValueError, match=says): list(text_batches(texts(), Words(), **bad))


def test_no_room_beside_the_special_tokens():
    with pytest.raises(ValueError, match="no room beside the 2 tokens"): list(text_batches(["a"], Words(True), max_tokens=2))


# --- the pass

def by_hand(model, sae, site, documents):
    "Activations and documents of one site, text by text without padding, and the quality of a stack on them."
    path, xs, ids = find_sites(model, site)[0].module, [], []
    for d, text in enumerate(documents):
        tokens = Words()(text)["input_ids"]
        for i in list(range(0, len(tokens), 12))[:3]:
            with hooks({"x": dict(model.named_modules())[path]}, lambda n, m, out: xs.append((out[0] if isinstance(out, tuple) else out)[0])), torch.no_grad():
                model(input_ids=torch.tensor([tokens[i:i + 12]]))
            ids += [d] * len(xs[-1])
    x = torch.cat(xs)
    shares = [ShareAccumulator(sae.n_features, 7) for _ in range(sae.stack)]
    return x, torch.tensor(ids), shares, sae_quality(sae, x, shares, torch.tensor(ids))


@pytest.mark.parametrize("site", ["embed", "attn_out_layer0", "resid_out_layer1"])
def test_the_pass_measures_what_one_would_by_hand(model, saes, site):
    m = measure_text(model, Words(), texts(), saes, **SETTINGS | dict(test_every=1))
    x, ids, shares, quality = by_hand(model, saes[site], site, texts())
    rows = m.measurement().per_seed.query("layer == @site")
    assert rows.n_samples.tolist() == [len(x)] * 2 and rows.n_documents.tolist() == [20, 20]
    for row, acc, l0, fvu, dead in zip(rows.itertuples(), shares, quality["l0"], quality["fvu"], quality["dead_fraction"]):
        e = acc.estimate()
        if row.fvu <= 1 or site == "embed": assert (row.effective_features, row.low, row.high) == pytest.approx((e.value, e.low, e.high), rel=1e-4)
        assert (row.l0, row.fvu, row.dead_fraction) == pytest.approx((l0.item(), fvu.item(), dead.item()), rel=1e-4)
    sums = m._sums[site]
    assert sums.peak.max().item() == pytest.approx(x.abs().max().item(), rel=1e-5)


def test_the_error_is_sampled_without_bias_in_what_is_tested(model, saes, whole):
    all_ = measure_text(model, Words(), texts(), saes, **SETTINGS | dict(test_every=1)).measurement().table
    some = whole.measurement().table
    assert some.fvu.tolist() == pytest.approx(all_.fvu.tolist(), rel=.2) and some.l0.tolist() == all_.l0.tolist()
    assert whole._sums["embed"].sums["tested"].sum() < .9 * whole._sums["embed"].sums["n"].sum()


class Kill(Exception): pass


@pytest.mark.parametrize("at", [3, 4, 9])
def test_killed_and_resumed_is_the_same(model, saes, whole, tmp_path, at):
    "Killed in the middle of its at-th forward pass, at every life."
    lives = 0
    while True:
        calls = iter(range(10**9))
        def die(*_):
            if next(calls) == at: raise Kill
        try:
            with hooks({"x": model.gpt_neox.layers[1].mlp}, die): m = measure_text(model, Words(), texts(), saes, checkpoint=tmp_path / "c", save_every=0, **SETTINGS)
            break
        except Kill: lives += 1
    assert lives >= 1
    same(m, whole)
    same(TextMeasurement.load(tmp_path / "c"), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["c"], "nothing half-written stays"
    with hooks({"x": model}, lambda *_: pytest.fail("a finished pass runs nothing")):
        same(measure_text(model, Words(), texts(), saes, checkpoint=tmp_path / "c", **SETTINGS), whole)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_parts_merge_to_the_whole(model, saes, whole, tmp_path, n):
    parts = [measure_text(model, Words(), texts(), saes, shard=(i, n), **SETTINGS) for i in range(n)]
    for i, p in enumerate(parts): p.save(tmp_path / str(i))
    parts = [TextMeasurement.load(tmp_path / str(i)) for i in reversed(range(n))]
    m = parts[0]
    for p in parts[1:]: m.merge(p)
    same(m, whole)
    assert m.n_documents == 20


def test_a_text_without_samples_between_others(model, saes, whole):
    "Special tokens alone are given to the network and counted nowhere."
    m = measure_text(model, Words(), texts() + ["<end> <end>"], saes, **SETTINGS | dict(batch_size=1, test_every=1))
    n = whole.measurement().table.n_samples
    assert m.measurement().table.n_samples.tolist() == n.tolist() and m._sums["embed"].sums["n"].sum() == m._sums["embed"].sums["tested"].sum()


def test_padding_changes_nothing_but_rounding(model, saes, whole):
    lone = measure_text(model, Words(), texts(), saes, **SETTINGS | dict(batch_size=1, test_every=1)).measurement().per_seed
    assert lone.l0.tolist() == pytest.approx(whole.measurement().per_seed.l0.tolist(), rel=1e-3)


def test_an_encoder_does_not_see_the_padding():
    "Attention to both sides: a text beside a longer one gives the codes that it gives alone."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=.3)).eval()
    sae = random_sae()
    sae.scale.fill_(1.)
    measured = lambda size: measure_text(net, Words(True), texts(), {"resid_out_layer1": sae}, **SETTINGS | dict(batch_size=size))._sums["resid_out_layer1"]
    together, alone = measured(3), measured(1)
    assert torch.allclose(together.sums["first"], alone.sums["first"], atol=1e-3) and together.sums["n"].tolist() == alone.sums["n"].tolist()
    for a, b in zip(together.shares, alone.shares): assert torch.allclose(a.shares, b.shares, rtol=1e-3, atol=1e-6)


def test_the_network_is_left_as_it_was(model, saes):
    model.train()
    state, flags = torch.get_rng_state(), [m.training for m in model.modules()]
    measure_text(model, Words(), texts(), saes, **SETTINGS)
    assert torch.equal(state, torch.get_rng_state()) and flags == [m.training for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    model.eval()


def test_special_tokens_are_samples_only_when_asked(model, saes):
    n = {special: measure_text(model, Words(True), texts(), saes, special=special, **SETTINGS).measurement().table.n_samples[0] for special in (False, True)}
    documents = sum(min(3, math.ceil(len(t.split()) / 10)) for t in texts())
    assert n[True] == n[False] + 2 * documents


def test_one_occurrence_of_each_type(model, saes, whole):
    types = whole._types
    used = sorted({t for b in text_batches(texts(), Words(), 12, 3, 3, 7) for t in b.input_ids[b.keep].tolist()})
    assert sorted(types.types.tolist()) == used and whole.dimensions().n_types.tolist() == [len(used)] * 4
    table = model.gpt_neox.embed_in.weight.detach()
    assert torch.equal(types.values["embed"], table[types.types.tolist()]), "each row belongs to its type"
    few = measure_text(model, Words(), texts(), saes, max_types=15, **SETTINGS)
    assert len(few._types.types) == 15 and torch.equal(few._types.values["embed"], table[few._types.types.tolist()])
    parts = [measure_text(model, Words(), texts(), saes, max_types=15, shard=(i, 2), **SETTINGS) for i in range(2)]
    same(parts[0].merge(parts[1]), few)


@pytest.mark.parametrize("cap", [2, 8, 14, 4000])
def test_the_occurrence_kept_is_the_one_with_the_lowest_key(model, saes, cap):
    "Of the types with the lowest hashes; found by hand among all tokens of the text."
    at, seen = {}, {}
    for b in text_batches(texts(), Words(), 12, 3, 3, 7):
        with hooks({"x": model.gpt_neox.layers[1]}, lambda n, m, out: seen.update(x=out[0] if isinstance(out, tuple) else out)), torch.no_grad(): model(**b.inputs)
        for row, column in b.keep.nonzero().tolist():
            key = sample_keys(np.array([b.documents[row]]), np.array([b.starts[row] + column]), 0)[0]
            token = b.input_ids[row, column].item()
            if token not in at or key < at[token][0]: at[token] = key, seen["x"][row, column]
    kept = sorted(at, key=lambda t: module._type_hashes(np.array([t]))[0])[:cap]
    types = measure_text(model, Words(), texts(), saes, max_types=cap, **SETTINGS)._types
    assert sorted(types.types.tolist()) == sorted(kept)
    for t, x in zip(types.types.tolist(), types.values["resid_out_layer1"]): assert torch.allclose(x, at[t][1], atol=1e-5)


def test_outliers_of_a_site_are_reported(saes):
    net = neox()
    net.gpt_neox.embed_in.weight.data[:, 6] += 5
    net.gpt_neox.embed_in.weight.data[3 + 119 % (VOCAB - 3), 9] = 1e4  # the token "w"
    m = measure_text(net, Words(), texts(), {"embed": Tamed(random_sae(), tame(net.gpt_neox.embed_in.weight.detach()))}, **SETTINGS)
    d = m.dimensions().iloc[0]
    assert set(d.outlier_neurons.split()) == {"6", "9"} and d.massive and d.peak > 1000
    assert measure_text(neox(), Words(), texts(), {"embed": random_sae()}, **SETTINGS).dimensions().outlier_neurons[0] == ""


def test_tamed_is_the_measurement_of_tamed_activations(saes):
    wild, calm = neox(), neox()
    wild.gpt_neox.embed_in.weight.data[:, 6] = 100 * wild.gpt_neox.embed_in.weight[:, 6].detach() + 9
    taming = tame(wild.gpt_neox.embed_in.weight.detach())
    calm.gpt_neox.embed_in.weight.data = taming(wild.gpt_neox.embed_in.weight.detach()).float()
    a = measure_text(wild, Words(), texts(), {"embed": Tamed(saes["embed"], taming)}, **SETTINGS).measurement().table
    b = measure_text(calm, Words(), texts(), {"embed": saes["embed"]}, **SETTINGS).measurement().table
    for c in ("effective_features", "l0", "fvu", "dead_fraction"): assert a[c][0] == pytest.approx(b[c][0], rel=1e-5), c


def test_curve_ends_at_the_measurement_and_grows(whole):
    c, rows = whole.curve(), whole.measurement().per_seed
    ends = c.groupby(["layer", "seed"], sort=False).last().reset_index()
    ok = rows.effective_features.notna().to_numpy()
    assert ends.effective_features[ok].tolist() == rows.effective_features[ok].tolist()
    assert (c.groupby(["layer", "seed"]).n_documents.diff().dropna() > 0).all() and set(ends.n_documents) == {20}


# --- what is refused

def refused(says, model, saes, documents=None, tok=Words(), **kwargs):
    with pytest.raises((ValueError, KeyError), match=says): measure_text(model, tok, texts() if documents is None else documents, saes, **{**SETTINGS, **kwargs})


def test_what_does_not_fit_is_refused(model, saes):
    refused("no site 'mlp_out_layer5'", model, {"mlp_out_layer5": saes["embed"]})
    refused("no text", model, saes, [])
    refused("no text", model, saes, ["  "])
    refused("AutoTokenizer", model, saes, tok=None)
    refused("16 neurons, its autoencoder was made for 12", model, {"embed": random_sae(n=12)})
    refused("no autoencoder for site.* embed", model, {"mlp_out_layer0": random_sae()}, sites=["embed"])
    refused("is a dict", model, {"embed": {}})
    refused("no site asked for", model, {})
    refused("no text for shard", model, saes, texts(1), shard=(1, 2))


def test_nan_in_the_network_is_refused(saes):
    net = neox()
    net.gpt_neox.embed_in.weight.data[:, 3] = math.nan
    refused("'embed'.* NaN or infinite", net, saes)


def test_an_autoencoder_that_makes_it_worse_is_refused_at_once(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrong = SparseAutoencoder(WIDTH, 400)
    long = [" ".join(texts(30))] * 8
    with hooks({"x": model}, lambda *_: None): refused("worse than zeros", model, {"embed": wrong}, long, max_tokens=60)


def test_at_the_end_f_is_withheld(model, saes):
    alike, poor = random_sae(), random_sae()
    alike.weight.data.zero_(); alike.bias.data.fill_(.001)
    poor.weight.data *= 2
    table = measure_text(model, Words(), texts(), {"embed": alike, "attn_out_layer0": poor}, **SETTINGS | dict(test_every=9)).measurement().table.set_index("layer")
    assert "F equals D" in table.warning["embed"] and "less than the mean" in table.warning["attn_out_layer0"]
    assert table[["effective_features", "low", "high", "superposition"]].isna().all(axis=None)


def test_silent_codes_are_flagged(model):
    silent = random_sae()
    silent.bias.data.fill_(-100.)
    row = measure_text(model, Words(), texts(), {"embed": silent}, **SETTINGS).measurement().table.iloc[0]
    assert row.effective_features == 0 and "nothing fires" in row.warning and row.dead_fraction == 1


@pytest.mark.parametrize("change, says", [
    (dict(max_tokens=10), "max_tokens=12 there, 10 now"), (dict(shard=(0, 2)), "shard"), (dict(documents=texts(20, 5)), "another text"), (dict(documents=texts(3)), "another text"),
    (dict(model=1), "model="), (dict(saes=1), "saes=")])
def test_a_checkpoint_of_another_run_is_refused(model, saes, tmp_path, change, says):
    measure_text(model, Words(), texts(), saes, checkpoint=tmp_path / "c", **SETTINGS)
    net = neox(1) if change.pop("model", 0) else model
    others = dict(saes, embed=random_sae(9)) if change.pop("saes", 0) else saes
    refused(says, net, others, checkpoint=tmp_path / "c", **change)


def test_a_checkpoint_that_is_none_is_refused(model, saes, tmp_path):
    (tmp_path / "c").write_text("{}")
    refused("not a readable safetensors", model, saes, checkpoint=tmp_path / "c")
    random_sae(stack=None).save(tmp_path / "d")
    refused("not written by TextMeasurement", model, saes, checkpoint=tmp_path / "d")


def test_what_does_not_merge(model, saes, whole):
    half = lambda **kw: measure_text(model, Words(), texts(), saes, **{**SETTINGS, "shard": (0, 2), **kw})
    a = half()
    for other, says in ((half(), "both parts hold documents"), (half(shard=(1, 2), max_tokens=10), "max_tokens differ"), (whole, "both parts hold")):
        with pytest.raises(ValueError, match=says): a.merge(other)
    b = half(shard=(1, 2))
    b.finished = False
    with pytest.raises(ValueError, match="not finished"): a.merge(b)


# --- models and autoencoders from disk

@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(load_text("python")[:10], VOCAB)


def test_from_disk_with_published_formats(model, tokenizer, tmp_path):
    "The path of a published model: saved, loaded, autoencoders in folders named as Pythia's."
    model.save_pretrained(tmp_path / "m"); tokenizer.save_pretrained(tmp_path / "m")
    for i, s in enumerate(find_sites(model)): export_sae(random_sae(i, stack=None), tmp_path / "saes" / "pythia-70m-deduped" / s.name / "10_32768", "dictionary_learning")
    net, tok = load_language_model(tmp_path / "m")
    saes = load_site_saes(net, str(tmp_path / "saes"), LanguageConfig().sae_folder)
    assert list(saes) == [s.name for s in find_sites(model)] and not net.training and net.dtype == torch.float32
    direct = {s.name: random_sae(i, stack=None) for i, s in enumerate(find_sites(model))}
    a, b = (measure_text(net, tok, load_text("python")[:8], d, **SETTINGS).measurement().table for d in (saes, direct))
    assert a.l0.tolist() == b.l0.tolist() and a.fvu.tolist() == pytest.approx(b.fvu.tolist(), rel=1e-5)


def test_weights_in_half_precision_run_in_single(tokenizer, tmp_path):
    "Whatever a version of transformers makes of the stored type."
    neox().half().save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    net, _ = load_language_model(tmp_path)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.gpt_neox.embed_in.weight, neox().gpt_neox.embed_in.weight.half().float())


def test_what_is_no_model_is_refused(model, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no transformers model"): load_language_model(tmp_path)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="no tokenizer"): load_language_model(tmp_path / "m")
    train_tokenizer(load_text("python")[:10], VOCAB + 90).save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match="do not belong together"): load_language_model(tmp_path / "m", tmp_path / "t")
    tokenizer.save_pretrained(tmp_path / "t2")
    assert len(load_language_model(tmp_path / "m", tmp_path / "t2")[1]) == len(tokenizer)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights as safetensors"): load_language_model(tmp_path / "m", tmp_path / "t2")
    torch.save(model.state_dict(), old := tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Fix: .*weights_only=True.*metadata={'format': 'pt'}"): load_language_model(tmp_path / "m", tmp_path / "t2")
    save_file({k: v.clone() for k, v in torch.load(old, weights_only=True).items()}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})  # what it says
    again = load_language_model(tmp_path / "m", tmp_path / "t2")[0]
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"superposition_lc\[language\]"): load_language_model(tmp_path / "m")


# --- the experiment

TINY = dataclasses.replace(SCALES["smoke"], text=str(Path(__file__).resolve().parent.parent / "README.md"), width=8, n_layers=1, n_heads=1, vocab=300, context=16, max_tokens=16, train_steps=5, windows=1, sae_samples=300,
                           estimator=SAEConfig(kind="relu", expansion=2, steps=20, max_rounds=2, warmup=5), n_groups=5)


@pytest.fixture(scope="module")
def table(): return run(TINY, progress=False)


def test_the_table(table):
    sites = table[table.part == "site"]
    assert list(sites.network) == ["trained"] * 4 + ["untrained"] * 4 and set(table.part) == {"site", "curve"}
    assert sites.loss[sites.network == "trained"].notna().all() and sites.loss[sites.network == "untrained"].isna().all()
    assert (sites.n_documents >= 10).all() and (table[table.part == "curve"].effective_features > 0).any()


def test_the_run_is_seeded(table):
    pd.testing.assert_frame_equal(run(TINY, progress=False), table)
    other = run(dataclasses.replace(TINY, seed=1), progress=False)
    assert other.seed.unique().tolist() == [1] and other.fvu[0] != table.fvu[0]


STEPS = "train_language_model", "train_site_saes", "measure_text", "train_site_saes", "measure_text"  # of a run of one seed with its control


def counted(monkeypatch, die_at=99):
    "Names of the dear steps as they are done; the `die_at`-th is done, but dies before anybody has its result."
    calls = []
    def watch(name, step):
        def call(*args, **kwargs):
            calls.append(name)
            result = step(*args, **kwargs)
            if len(calls) == die_at: raise Kill
            return result
        monkeypatch.setattr(language, name, call)
    for name in set(STEPS): watch(name, {"measure_text": measure_text}.get(name) or getattr(language, name))
    return calls


@pytest.mark.parametrize("at", range(1, 6))
def test_a_killed_run_goes_on(table, tmp_path, monkeypatch, at):
    "What was finished is not done again, what was under way is, and the table is the same."
    with monkeypatch.context() as first:
        done = counted(first, at)
        with pytest.raises(Kill): run(TINY, progress=False, store=tmp_path)
    assert done == list(STEPS[:at])
    with monkeypatch.context() as second:
        done = counted(second)
        pd.testing.assert_frame_equal(run(TINY, progress=False, store=tmp_path), table, check_exact=True)
    again = {1: STEPS, 2: STEPS[1:], 3: STEPS[2:], 4: STEPS[2:], 5: ("measure_text", "measure_text")}[at]
    assert done == list(again)
    assert not [p for p in tmp_path.rglob(".*")], "nothing half-written stays"


def test_what_another_run_kept_is_not_taken(table, tmp_path):
    run(TINY, progress=False, store=tmp_path)
    other = dataclasses.replace(TINY, lr=1e-2)
    pd.testing.assert_frame_equal(run(other, progress=False, store=tmp_path), run(other, progress=False))
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "t.txt").write_text(Path(TINY.text).read_text(encoding="utf-8") + "\n\nMore.", encoding="utf-8")
    more = dataclasses.replace(TINY, text=str(tmp_path / "t.txt"))
    names = [language._folder(tmp_path, more, "trained", list(read_texts(more.text)))]
    (tmp_path / "t.txt").write_text("Another text.", encoding="utf-8")
    assert language._folder(tmp_path, more, "trained", list(read_texts(more.text))) not in names


@pytest.mark.parametrize("name", ["network.safetensors", "saes/sites.json", "saes/embed.safetensors", "pass.safetensors"])
def test_a_damaged_part_is_named(tmp_path, name):
    run(TINY, progress=False, store=tmp_path)
    path = next(tmp_path.glob("trained*")) / name
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="(damaged|not a readable)"): run(TINY, progress=False, store=tmp_path)


def test_tamed_autoencoders_are_kept(tmp_path):
    "Bit for bit, with the map before them."
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 40 * x[:, 3] + 7
    saes = dict(embed=random_sae(), mlp_out_layer0=Tamed(random_sae(1), tame(x)))
    language._keep_saes(tmp_path / "saes", saes, dict(embed=[True, False], mlp_out_layer0=[True, True]))
    read, converged = language._kept_saes(tmp_path, None, None, None, None, False)
    assert converged["embed"] == [True, False] and {n: module._fingerprint(s) for n, s in read.items()} == {n: module._fingerprint(s) for n, s in saes.items()}
    assert torch.equal(read["mlp_out_layer0"].taming(x), saes["mlp_out_layer0"].taming(x)) and read["mlp_out_layer0"].taming.neurons == (3,)


def test_report_writes_figures_and_reads_a_table_from_disk(table, tmp_path):
    table.to_csv(tmp_path / "t.csv", index=False, na_rep="nan")
    read = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values=["nan"])
    text = report(read, TINY, tmp_path)
    assert text == reading(table, TINY) and "published for Pythia-70M: mlp 11.98 > residual 9.47 > embedding 8.20 > attention 5.60" in text
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["dimensions.png", "figure-6a-documents.png", "figure-6a.png"]


def test_sanity_values_of_pythia_are_compared(table):
    t = table.assign(l0=[2 * published(k, d, language.PUBLISHED_L0) for k, d in zip(table.kind, table.depth)])
    assert "L0 over the published: 2.00 to 2.00" in reading(t, dataclasses.replace(TINY, model="EleutherAI/pythia-70m-deduped"))


def test_published_values():
    assert published("mlp", 2) == 10500 and published("embedding", 0) == 4200 and published("residual", 6, language.PUBLISHED_L0) == 72
    assert math.isnan(published("mlp", 0)) and math.isnan(published("other", 1))
    for values in (language.PUBLISHED, language.PUBLISHED_L0, language.PUBLISHED_ALIVE): assert {k: len(v) for k, v in values.items()} == dict(embedding=1, attention=6, mlp=6, residual=6)


@pytest.mark.parametrize("bad, says", [
    (dict(width=0), "width must"), (dict(n_groups=2), "three groups"), (dict(width=50), "multiple of n_heads"), (dict(max_tokens=65), "exceeds the model's context"), (dict(vocab=200), "at least 300"),
    (dict(saes="x"), "name it"), (dict(windows=0), "windows must")])
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says): LanguageConfig(**bad)


def test_bad_requests_are_refused(table, monkeypatch):
    with pytest.raises(ValueError, match="no row of network 'x'"): plot_layers(table, "x")
    with pytest.raises(ValueError, match="no site 'x'"): plot_convergence(table, ["x"])
    with pytest.raises(ValueError, match="less than one window"): language.train_language_model(TINY, ["a b"], progress=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"): load_text("datasets:a/b")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"superposition_lc\[language\]"): run(TINY, progress=False)


def test_a_stream_is_shuffled_by_the_seed(monkeypatch):
    class Stream(list):
        def shuffle(self, seed, buffer_size): return Stream([{"text": f"seed {seed}"}])
    fake = type(sys)("datasets")
    fake.load_dataset = lambda name, split, streaming: Stream() if (name, split, streaming) == ("a/b", "train", True) else None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(read_texts(load_text("datasets:a/b", 42))) == ["seed 42"]


def test_training_learns(monkeypatch):
    "A text of one repeated sentence is predicted far better than by its token frequencies."
    config = dataclasses.replace(TINY, width=16, context=24, max_tokens=24, train_steps=150, lr=1e-2)
    _, tok, scores = language.train_language_model(config, ["the cat sat on the mat and the dog sat on the log. " * 40], progress=False)
    assert scores["loss"] < .5 * scores["unigram"] and tok.decode(tok("the cat")["input_ids"]) == "the cat"


def test_the_tame_end_of_a_transformer():
    "The failure of an outlier neuron, and its cure, on a site of a network."
    net = neox()
    x = net.gpt_neox.embed_in.weight.detach().clone()
    x[:, 6] = 100 * x[:, 6] + 3
    quick = SAEConfig(kind="relu", expansion=4, steps=200, max_rounds=2, warmup=50)
    l0 = {name: train_sae(a, quick, progress=False).table.l0[0] for name, a in dict(plain=net.gpt_neox.embed_in.weight.detach(), wild=x, tamed=tame(x)(x)).items()}
    assert l0["wild"] < .3 * l0["plain"] and l0["tamed"] == pytest.approx(l0["plain"], rel=.3)


def test_an_encoder_with_an_outlier_is_trained_tamed_and_measured(tokenizer):
    "A BERT, as MiniLM is one: sites before the sum, the outlier neuron found, its autoencoder trained on tamed activations."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)).eval()
    net.encoder.layer[0].output.dense.bias.data[3] = 50.
    config = dataclasses.replace(TINY, model="a folder", max_documents=12, estimator=dataclasses.replace(TINY.estimator, steps=300))
    documents = load_text(config.text)
    saes, converged = language.train_site_saes(net, tokenizer, documents, config, progress=False)
    assert {name for name, s in saes.items() if isinstance(s, Tamed)} == {"mlp_out_layer0", "resid_out_layer0"} and saes["mlp_out_layer0"].taming.neurons == (3,)
    m = measure_text(net, tokenizer, documents, saes, max_documents=12, **{k: v for k, v in SETTINGS.items() if k != "max_documents"})
    d, t = m.dimensions().set_index("layer"), m.measurement(converged=converged).table.set_index("layer")
    assert d.outlier_neurons["mlp_out_layer0"] == "3" and d.outlier_neurons["embed"] == ""
    assert t.fvu["mlp_out_layer0"] < .9 and t.effective_features["mlp_out_layer0"] > 3
    assert t.warning.str.contains("not converged").tolist() == [not all(converged[n]) for n in t.index]
