"""Compiled transformers: exact runs, other people's programs, exact stacks, compression with known answers, controls, and what is refused."""
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from importlib.resources import files
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from superposition_lc.activations import capture
from superposition_lc.entropy import effective_features, feature_shares
from superposition_lc.experiments.algorithmic import (
    ARRAYS, ESTIMATORS, SCALES, TASKS, AlgorithmicConfig, Compressed, Networks, Transformer, accuracy, all_inputs, cells, evidence, exact_facts, from_tracr,
    kept_directions, load_compiled, measure_layers, planted_code, plot_attention, plot_controls, plot_residuals, plot_width, read_compiled, report, run,
    train_cell, train_compressed, train_from_scratch, verdict)
from superposition_lc.sae import SAEConfig

replace = dataclasses.replace
QUICK = SAEConfig(kind="sparse_coding", expansion=4, steps=30, max_rounds=2, refine_steps=4)
TINY = AlgorithmicConfig(("reverse",), (8, 3), n_seeds=1, compress_steps=3, scratch_steps=3, n_sequences=20, default=QUICK, released=SAEConfig.released(epochs=2))
FOLDER = files("superposition_lc.experiments") / "tracr-weights"


@pytest.fixture(scope="module", params=list(TASKS))
def program(request):
    return load_compiled(request.param)


@pytest.fixture(scope="module")
def reverse():
    return load_compiled("reverse")


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "reverse.npz") as f:
        return dict(f)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module")
def table(store):
    return run(TINY, progress=False, store=store)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the compiled programs

def test_residuals_are_those_of_the_compiler(program):
    for kind in ("example", "short"):
        ids, stored = program.examples[f"{kind}_tokens"], program.examples[f"{kind}_residuals"]
        found = torch.stack(list(program.model.residuals(ids).values()), 1)
        assert found.shape == stored.shape and (found - stored).abs().max() < 1e-4
        assert program.answer(ids).equal(program.examples[f"{kind}_expected"])


def test_every_input_is_answered(program):
    n = 0
    for length in range(1, 6):
        ids = all_inputs(program, length)
        assert accuracy(program.model, ids, TASKS[program.name](ids)) == 1 and len({*map(tuple, ids.tolist())}) == 5**length
        n += len(ids)
    assert n == 3905


def test_answers_are_reversed_and_sorted(program):
    "Against Python's own."
    rows = [[3, 1, 4, 1, 5], [5, 4, 3, 2, 1], [2, 2, 2, 2, 2]]
    wanted = [[str(t) for t in (r[::-1] if program.name == "reverse" else sorted(r))] for r in rows]
    assert [[program.output_vocab[i] for i in r] for r in program.answer(program.encode(rows))] == wanted


def test_capture_sees_the_stages(program):
    ids = all_inputs(program, 2)
    stages = program.model.residuals(ids)
    found = capture(program.model, ids, list(stages), progress=False)
    for name, x in stages.items():
        assert torch.equal(found[name].values, x.flatten(0, 1)) and found[name].clusters.tolist() == [i for i in range(25) for _ in range(3)]


@pytest.mark.parametrize("ids, says", [
    (torch.tensor([[5, 0, 7]]), r"hold \[7\], outside the vocabulary 0..6"), (torch.tensor([[5, -1]]), "outside the vocabulary"), (torch.tensor([[5, 0, 6]]), "PAD"),
    (torch.tensor([[5, 0, 1, 2, 3, 4, 0]]), "7 positions are too long"), (torch.tensor([5, 0]), "sequences, positions"), (torch.tensor([[5., 0.]]), "int64"),
    (torch.zeros(0, 3, dtype=torch.int64), "sequences, positions"), ([[5, 0]], "got list")])
def test_bad_tokens_are_refused(reverse, ids, says):
    with pytest.raises(ValueError, match=says):
        reverse.model(ids)


@pytest.mark.parametrize("rows, says", [([[1, 9]], r"unknown tokens \['9'\]"), ([[1, 2], [3]], r"lengths \[2, 1\]"), ([], "at least one")])
def test_bad_sequences_are_refused(reverse, rows, says):
    with pytest.raises(ValueError, match=says):
        reverse.encode(rows)


# --- files

def saved(tmp_path, arrays, **changes):
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


def test_a_copy_is_read(tmp_path, arrays, reverse):
    p, ids = read_compiled(saved(tmp_path, arrays)), all_inputs(reverse, 3)
    assert p.model(ids).equal(reverse.model(ids)) and p.labels == reverse.labels and p.width == 45


@pytest.mark.parametrize("changes, says", [
    (dict(W_O=None), r"arrays \['W_O'\] are missing"), (dict(vocab=None, b_in=None), r"\['vocab', 'b_in'\] are missing"), (dict(W_in=np.zeros((4, 45), np.float32)), r"W_in has shape \(4, 45\)"),
    (dict(W_out=np.zeros((4, 30, 44), np.float32)), r"W_out has shape \(4, 30, 44\)"), (dict(unembed=np.zeros((44, 5), np.float32)), "unembed"), (dict(residual_labels=np.array(["a"])), "residual_labels has 1"),
    (dict(output_vocab=np.array(["1"])), "output_vocab has 1 entries, expected 5"), (dict(layer_norm=np.array(True)), "layer norm"), (dict(activation=np.array("gelu")), "gelu"),
    (dict(b_O=np.full((4, 45), np.nan, np.float32)), "b_O holds NaN"), (dict(labels=np.array([{}], dtype=object), task=np.array([{}], dtype=object)), "not a readable npz")])
def test_bad_files_are_refused(tmp_path, arrays, changes, says):
    with pytest.raises(ValueError, match=says):
        read_compiled(saved(tmp_path, arrays, **changes))


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(ValueError, match="not a readable npz"):
        read_compiled(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        read_compiled(tmp_path / "y.npz")
    with pytest.raises(ValueError, match=r"task must be one of \['reverse', 'sort'\]"):
        load_compiled("parity")


# --- programs of other people

VOCAB, OUT = ["a", "b", "compiler_bos", "compiler_pad"], ["False", "True"]


def assembled(heads=2, layers=2, causal=True, seed=0, **changes):
    "What the compiler returns, with random weights and biases: M = 9, key size 3, 4 hidden."
    g = np.random.default_rng(seed)
    normal = lambda *shape: .4 * g.normal(size=shape).astype(np.float32)
    labels = ["flag_2:False", "flag_2:True", "indices:0", "indices:1", "one", "tokens:a", "tokens:b", "tokens:compiler_bos", "tokens:compiler_pad"]
    M, K, F = len(labels), 3, 4
    params = {"token_embed": {"embeddings": normal(4, M)}, "pos_embed": {"embeddings": normal(4, M)}}
    for l in range(layers):
        at = f"transformer/layer_{l}/"
        params |= {f"{at}attn/{n}": {"w": normal(M, heads * K), "b": normal(heads * K)} for n in ("query", "key", "value")}
        params |= {f"{at}attn/linear": {"w": normal(heads * K, M), "b": normal(M)}, f"{at}mlp/linear_1": {"w": normal(M, F), "b": normal(F)}, f"{at}mlp/linear_2": {"w": normal(F, M), "b": normal(M)}}
    config = SimpleNamespace(num_heads=heads, num_layers=layers, key_size=K, layer_norm=False, causal=causal, activation_function=torch.relu)
    encoder = lambda words, **more: SimpleNamespace(encoding_map={w: i for i, w in enumerate(words)}, **more)
    return SimpleNamespace(**{**dict(params=params, model_config=config, residual_labels=labels, output_encoder=encoder([False, True]),
                                     input_encoder=encoder(VOCAB, bos_encoding=2, pad_encoding=3)), **changes})


def plain_forward(a, ids):
    "The same network in numpy, one position and one head at a time."
    P = a.params
    M, K, H = len(a.residual_labels), a.model_config.key_size, a.model_config.num_heads
    x, streams = np.stack([P["token_embed"]["embeddings"][t] + P["pos_embed"]["embeddings"][i] for i, t in enumerate(ids)]).astype(np.float64), []
    for l in range(a.model_config.num_layers):
        w = {n: P[f"transformer/layer_{l}/{n}"] for n in ("attn/query", "attn/key", "attn/value", "attn/linear", "mlp/linear_1", "mlp/linear_2")}
        q, k, v = (x @ w[f"attn/{n}"]["w"] + w[f"attn/{n}"]["b"] for n in ("query", "key", "value"))
        out = np.zeros_like(x) + w["attn/linear"]["b"]
        for h in range(H):
            s = slice(h * K, (h + 1) * K)
            for i in range(len(x)):
                seen = range(i + 1) if a.model_config.causal else range(len(x))
                e = np.exp([q[i, s] @ k[j, s] / math.sqrt(K) for j in seen])
                out[i] += (sum(p * v[j, s] for p, j in zip(e / e.sum(), seen))) @ w["attn/linear"]["w"][s]
        streams.append(x := x + out)
        streams.append(x := x + np.maximum(x @ w["mlp/linear_1"]["w"] + w["mlp/linear_1"]["b"], 0) @ w["mlp/linear_2"]["w"] + w["mlp/linear_2"]["b"])
    return streams


@pytest.mark.parametrize("heads, causal", [*itertools.product((1, 2), (False, True))])
def test_another_program_runs_as_written(heads, causal):
    "Heads, mask and biases, which the two programs of the package do not have."
    a = assembled(heads, causal=causal)
    p = from_tracr(a)
    ids = p.encode([["a", "b", "b"], ["b", "a", "a"]])
    assert ids.tolist() == [[2, 0, 1, 1], [2, 1, 0, 0]] and p.output_vocab == ("False", "True")
    found = list(p.model.residuals(ids).values())[1:]
    for b in range(2):
        for ours, true in zip(found, plain_forward(a, ids[b].tolist())):
            assert np.allclose(ours[b].numpy(), true, rtol=1e-4, atol=1e-4)
    assert p.model(ids).equal(found[-1][..., :2])     # flag_2:False and flag_2:True
    assert capture(p.model, ids, ["layers.1.mlp"], progress=False)["layers.1.mlp"].values.shape == (8, 9)


def test_the_compilers_layout_gives_the_same_program(arrays, reverse):
    "The stored arrays, put into the compiler's layout and read back."
    params = {"token_embed": {"embeddings": arrays["token_embed"]}, "pos_embed": {"embeddings": arrays["pos_embed"]}}
    for l in range(4):
        for n, long in dict(Q="query", K="key", V="value").items():
            params[f"transformer/layer_{l}/attn/{long}"] = {"w": arrays[f"W_{n}"][l, 0], "b": arrays[f"b_{n}"][l, 0]}
        for where, w, b in (("attn/linear", arrays["W_O"][l, 0], "b_O"), ("mlp/linear_1", arrays["W_in"][l], "b_in"), ("mlp/linear_2", arrays["W_out"][l], "b_out")):
            params[f"transformer/layer_{l}/{where}"] = {"w": w, "b": arrays[b][l]}
    config = SimpleNamespace(num_heads=1, num_layers=4, key_size=12, layer_norm=False, causal=False, activation_function=torch.relu)
    words = lambda v, **k: SimpleNamespace(encoding_map={w: i for i, w in enumerate(v)}, **k)
    p = from_tracr(SimpleNamespace(params=params, model_config=config, residual_labels=list(reverse.labels), output_encoder=words([1, 2, 3, 4, 5]),
                                   input_encoder=words([1, 2, 3, 4, 5, "BOS", "PAD"], bos_encoding=5, pad_encoding=6)))
    ids = all_inputs(reverse, 4)
    assert p.model(ids).equal(reverse.model(ids)) and p.vocab == reverse.vocab


def test_what_the_compiler_made_is_read(root):
    "Four heads, eight layers and a mask, as tracr 1.0.0 compiled them, against the streams of its own network: balanced brackets of two kinds."
    with np.load(root / "tests" / "data" / "tracr-dyck.npz") as f: a = dict(f)
    params = {}
    for name in (n for n in a if n.startswith("params|")): params.setdefault(name.split("|")[1], {})[name.split("|")[2]] = a[name]
    words = lambda v, **k: SimpleNamespace(encoding_map={w: i for i, w in enumerate(v)}, **k)
    config = SimpleNamespace(layer_norm=False, activation_function=torch.relu, **{n: a[n].item() for n in ("num_heads", "num_layers", "key_size", "causal")})
    compiled = SimpleNamespace(params=params, model_config=config, residual_labels=a["labels"].tolist(), output_encoder=words([False, True]),
                               input_encoder=words(a["vocab"].tolist(), bos_encoding=a["bos"].item(), pad_encoding=a["pad"].item()))
    with pytest.raises(ValueError, match="variables have the output's values .* pass output="):
        from_tracr(compiled)
    p = from_tracr(compiled, output=next(l for l in a["labels"] if l.startswith("shuffle_dyck")).partition(":")[0])
    assert (p.model.layers[0].attn.n_heads, len(p.model.layers), p.model.layers[0].attn.causal) == (4, 8, True)
    ids = p.encode(a["sequences"].tolist())
    streams = torch.stack(list(p.model.residuals(ids).values())[1:], 1)
    assert np.abs(streams.numpy() - a["residuals"]).max() < 1e-4 < np.abs(a["residuals"]).max()
    assert [[p.output_vocab[i] for i in r] for r in p.answer(ids)] == a["decoded"].tolist()
    assert {*a["decoded"][0]} == {"True", "False"} and len(all_inputs(p, 2)) == 16


@pytest.mark.parametrize("make, vocab, causal, output", [
    (lambda lib, rasp: lib.make_reverse(rasp.tokens), "12345", False, None), (lambda lib, rasp: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=5, min_key=1), (1, 2, 3, 4, 5), False, None),
    (lambda lib, rasp: lib.make_length(), "abc", False, None), (lambda lib, rasp: lib.make_hist(), "abc", False, None),
    (lambda lib, rasp: lib.make_frac_prevs(rasp.tokens == "x"), "xy", True, "frac_prevs"), (lambda lib, rasp: lib.make_shuffle_dyck(["()", "{}"]), "(){}", True, "shuffle_dyck")])
def test_programs_compiled_here(make, vocab, causal, output):
    "Residual streams and answers of tracr's own networks, where it is installed."
    lib = pytest.importorskip("tracr.compiler.lib", reason="tracr is not installed (pip install tracr-pypi): its networks were not compared, only a stored one")
    from tracr.compiler.compiling import compile_rasp_to_model
    from tracr.rasp import rasp
    compiled = compile_rasp_to_model(make(lib, rasp), vocab={*vocab}, max_seq_len=5, compiler_bos="BOS", causal=causal)
    p = from_tracr(compiled, output and next(l for l in compiled.residual_labels if l.startswith(output)).partition(":")[0])
    for length in (1, 3, 5):
        sequences = [*itertools.product(sorted(vocab), repeat=length)][:7]
        ids = p.encode(sequences)
        streams, answers = list(p.model.residuals(ids).values())[1:], p.answer(ids)
        for b, sequence in enumerate(sequences):
            theirs = compiled.apply(["BOS", *sequence])
            assert len(theirs.residuals) == len(streams)
            for mine, true in zip(streams, theirs.residuals):
                assert np.allclose(mine[b].numpy(), np.asarray(true)[0], atol=1e-4)
            if len(p.output_vocab) > 1: assert [p.output_vocab[i] for i in answers[b]] == [str(v) for v in theirs.decoded[1:]]
            else: assert answers[b].tolist() == pytest.approx(theirs.decoded[1:], abs=1e-4)


@pytest.mark.parametrize("changes, says", [
    (dict(input_encoder=None), "input_encoder has no vocabulary"),
    (dict(residual_labels=["x"] * 9), "0 variables have the output's values"), (dict(residual_labels=[*"abc"]), "0 variables"),
    (dict(model_config=SimpleNamespace(layer_norm=True)), "layer norm"),
    (dict(model_config=SimpleNamespace(layer_norm=False, activation_function=torch.nn.functional.gelu)), "activation gelu")])
def test_programs_that_cannot_be_run_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        from_tracr(assembled(**changes))


def test_missing_parameters_and_wrong_outputs_are_named():
    a = assembled()
    del a.params["transformer/layer_1/mlp/linear_2"]["b"]
    with pytest.raises(ValueError, match="transformer/layer_1/mlp/linear_2' with 'b'"):
        from_tracr(a)
    with pytest.raises(ValueError, match="output='tokens' has no .'tokens:False'"):
        from_tracr(assembled(), output="tokens")
    twice = assembled(residual_labels=["flag_2:False", "flag_2:True", "flag_3:False", "flag_3:True", "one", "tokens:a", "tokens:b", "x", "y"])
    with pytest.raises(ValueError, match=r"2 variables .* pass output=, one of \['flag_2', 'flag_3'\]"):
        from_tracr(twice)
    assert from_tracr(twice, output="flag_3").model.unembed.argmax(0).tolist() == [2, 3]


def test_an_output_that_is_a_number():
    "The number itself is the answer: the direction without values that is neither the constant nor a step of counting."
    labels = ["fraction_2", "indices:0", "indices:1", "one", "x_selector_width_attn_output", "tokens:a", "tokens:b", "tokens:compiler_bos", "tokens:compiler_pad"]
    p = from_tracr(assembled(residual_labels=labels, output_encoder=SimpleNamespace()))
    ids = p.encode([["a", "b"]])
    assert p.output_vocab == ("fraction_2",) and p.answer(ids).equal(p.model.residuals(ids)["layers.1.mlp"][:, 1:, 0])
    for unclear, says in ((["fraction_2", "other", *labels[2:]], "2 variables have a number"), (["a:0", "a:1", *labels[2:]], "0 variables have a number")):
        with pytest.raises(ValueError, match=says):
            from_tracr(assembled(residual_labels=unclear, output_encoder=SimpleNamespace()))


# --- stacks

def random_weights(*lead, M=6, seed=0):
    sizes = dict(V=7, L=6, M=M, P=2, H=2, K=3, F=5, O=5)
    return {n: .5 * random(*lead, *(sizes[a] for a in shape), seed=seed + i) for i, (n, shape) in enumerate(ARRAYS.items())}


def test_a_stack_is_its_members(reverse):
    w, ids = random_weights(3), all_inputs(reverse, 2)
    stack = Transformer(w)
    for k in range(3):
        one = Transformer({n: v[k] for n, v in w.items()})
        assert torch.allclose(stack(ids)[k], one(ids), atol=1e-5)
        for a, b in zip(stack.residuals(ids).values(), one.residuals(ids).values()):
            assert torch.allclose(a[k], b, atol=1e-5)


def test_padding_is_exact(reverse):
    "A narrow transformer trained beside a wide one is the one trained alone."
    ids = all_inputs(reverse, 3)
    answers = TASKS["reverse"](ids)
    both, alone = (train_from_scratch(reverse, ids, answers, w, [0, 1], steps=10, progress=False) for w in ([9, 4], [4]))
    a, b = both.residuals(ids)["layers.3.mlp"], alone.residuals(ids)["layers.3.mlp"]
    assert torch.allclose(a[2:, ..., :4], b, atol=1e-4) and not a[2:, ..., 4:].any() and a[:2].any(0).all() and not torch.equal(a[0], a[1])
    both, alone = (train_compressed(reverse, ids, answers, w, [0, 1], steps=10, progress=False).weight for w in ([9, 4], [4]))
    assert torch.allclose(both[2:, :4], alone, atol=1e-4) and not both[2:, 4:].any()


def test_training_is_seeded_and_leaves_random_numbers_alone(reverse):
    ids, state = all_inputs(reverse, 2), torch.get_rng_state()
    go = lambda seed: train_compressed(reverse, ids, TASKS["reverse"](ids), [5], [seed], steps=3, progress=False).weight
    assert torch.equal(go(0), go(0)) and not torch.equal(go(0), go(1)) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("widths, seeds, says", [([0], [0], "widths must lie in 1..45"), ([46], [0], "widths"), ([], [0], "widths"), ([4], [], "seeds")])
def test_bad_members_are_refused(reverse, widths, seeds, says):
    ids = all_inputs(reverse, 2)
    for train in (train_compressed, train_from_scratch):
        with pytest.raises(ValueError, match=says):
            train(reverse, ids, TASKS["reverse"](ids), widths, seeds, steps=1)


# --- compression

def test_what_keeps_everything_changes_nothing(program):
    "Identity and a rotation, every input."
    M = program.width
    W = torch.stack([torch.eye(M), torch.linalg.qr(random(M, M)).Q])
    for length in range(1, 6):
        ids = all_inputs(program, length)
        assert accuracy(Compressed(program.model, W), ids, TASKS[program.name](ids)).tolist() == [1, 1]


def test_codes_are_what_passes(reverse):
    W, ids = .3 * random(2, 7, 45), all_inputs(reverse, 2)
    codes, streams = Compressed(reverse.model, W).stages(ids)
    assert len(codes) == len(streams) == 5 and codes[0].shape == (2, 25, 3, 7)
    x = reverse.model.embed(ids)
    for k in range(2):
        assert torch.allclose(codes[0][k], x @ W[k].T, atol=1e-5) and torch.allclose(streams[0][k], (x @ W[k].T @ W[k]).relu(), atol=1e-5)
        y = reverse.model.layers[0](streams[0][k])
        assert torch.allclose(codes[1][k], y @ W[k].T, atol=1e-4)
    with pytest.raises(ValueError, match=r"weight must have shape \(stack, N, 45\)"):
        Compressed(reverse.model, W[0])


def test_without_the_output_directions_nothing_is_answered(reverse):
    W = torch.eye(45)[[i for i, l in enumerate(reverse.labels) if not l.startswith("reverse_")]][None]
    ids = all_inputs(reverse, 3)
    answers = TASKS["reverse"](ids)
    assert accuracy(Compressed(reverse.model, W), ids, answers).item() == pytest.approx((answers == 0).double().mean().item())  # all logits 0: the first


def test_compression_solves_wide_and_fails_narrow(reverse):
    ids = all_inputs(reverse, 5)
    answers = TASKS["reverse"](ids)
    net = train_compressed(reverse, ids, answers, [24, 2], steps=60, progress=False)
    wide, narrow = accuracy(net, ids, answers).tolist()
    assert wide == 1 and narrow < .6


def test_four_exclusive_values_in_two_neurons_are_kept():
    "Superposition without an estimator: rank 3 passes through N = 2, since a ReLU clears the interference of a square; a triangle needs none."
    angle = torch.tensor([0., 1, 2, 3]) * math.pi / 2
    W, x = torch.stack([angle.cos(), angle.sin()]), torch.eye(4).repeat(20, 1)
    assert kept_directions(x, (x @ W.T @ W).relu()) == dict(kept=4, kept_rank=3) and exact_facts(x @ W.T)["rank"] == 2
    assert kept_directions(x, x @ W.T @ W) == dict(kept=0, kept_rank=0) == kept_directions(x, -x)
    angle = torch.tensor([0., 2, 4]) * math.pi / 3
    W, x = torch.stack([angle.cos(), angle.sin()]), torch.eye(3).repeat(20, 1)
    assert kept_directions(x, x @ W.T @ W) == dict(kept=3, kept_rank=2)


def test_kept_directions_know_their_limit():
    x = random(500, 4).abs()
    y = x.clone()
    y[:, 1] += math.sqrt(.05) * x[:, 1].std() * random(500, seed=1).sign()
    y[:, 2] += math.sqrt(.2) * x[:, 2].std() * random(500, seed=2).sign()
    assert kept_directions(x, y) == kept_directions(x, 7 * y) == dict(kept=3, kept_rank=3)
    assert kept_directions(x, y, least=.7) == dict(kept=4, kept_rank=4) and kept_directions(x, y, least=.99)["kept"] == 2
    assert kept_directions(torch.ones(10, 3), torch.ones(10, 3)) == dict(kept=0, kept_rank=0)     # what never varies


def test_exact_facts_of_known_vectors():
    x = torch.eye(4)[[0, 1, 2, 2, 0]]
    assert exact_facts(x) == dict(rank=3, distinct=3) and exact_facts(1e-6 * x) == exact_facts(1e6 * x) == dict(rank=3, distinct=3)
    assert exact_facts(x + 1e-7) == dict(rank=3, distinct=3)


def test_ranks_of_the_programs():
    "Known from an independent computation on inputs of length five."
    for task, ranks in dict(reverse=[10, 10, 10, 14], sort=[26, 30, 34]).items():
        p = load_compiled(task)
        x = list(p.model.residuals(all_inputs(p, 5)).values())[2::2]
        assert [exact_facts(v.flatten(0, 1))["rank"] for v in x] == ranks


# --- controls and estimators

@pytest.mark.parametrize("n, kind, values", [(2, "orthogonal", 2), (3, "orthogonal", 3), (8, "orthogonal", 8), (7, "orthogonal", 7), (3, "exclusive", 4), (9, "exclusive", 10), (8, "random", 16), (2, "random", 4)])
def test_planted_codes_are_what_they_say(n, kind, values):
    "The known F is the Hill number of the values' shares; directions, rank, count of distinct vectors."
    a, known = planted_code(n, kind, 20_000, seed=3)
    b, _ = planted_code(n, kind, 20_000, seed=3)
    assert torch.equal(a.values, b.values) and a.values.shape == (20_000, n)
    sizes = [values] if values < 4 else [values // 2, values - values // 2]
    shares = torch.cat([torch.full((k,), 1. / k / len(sizes)) for k in sizes]).double()
    assert known == pytest.approx(effective_features(feature_shares(shares[None])))
    facts = exact_facts(a.values)
    assert facts["distinct"] == math.prod(sizes) and facts["rank"] == min(n, values - len(sizes) + 1)
    if kind != "random": assert torch.allclose(a.values.square().sum(1), torch.tensor(float(len(sizes))), atol=1e-4)  # lossless: lengths are kept


@pytest.mark.parametrize("args, says", [((1,), "at least 2"), ((2, "exclusive"), "at least 3"), ((4, "dense"), "kind must be one of")])
def test_bad_controls_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        planted_code(*args)


def test_the_default_estimator_counts_orthogonal_values():
    "F = N: neither the sixteen combinations nor a dense rotation. At a fifth of the budget."
    codes = {f"{s}": planted_code(8, "orthogonal", 1500, s)[0] for s in range(2)}
    t = measure_layers(codes, SAEConfig(max_rounds=2, refine_steps=300), SAEConfig.released(epochs=2), (.15, 2.4, 9.6), progress=False)
    assert set(t.estimator) == {*ESTIMATORS} and len(t) == 6
    for e in ("default", "distortion"):
        assert t[t.estimator == e].effective_features.tolist() == pytest.approx([8, 8], rel=.08)
    assert (t.superposition == t.effective_features / 8).all()


def test_a_distortion_out_of_reach_is_said():
    codes = {"a": planted_code(4, "orthogonal", 300)[0]}
    t = measure_layers(codes, QUICK, SAEConfig.released(epochs=1), (.3,), distortion=1e-9, progress=False)
    row = t[t.estimator == "distortion"].iloc[0]
    assert math.isnan(row.effective_features) and row.warning.startswith("no F at this distortion: fvu=1e-09 lies outside")


# --- the experiment

def test_table_is_tidy(table):
    layers = [f"layer {i}" for i in range(4)]
    assert len(table) == 4 * 3 + 2 * 2 * 4 * 3 + 2 * 3 * 3
    assert not table.duplicated(["task", "network", "n", "layer", "seed", "estimator"]).any()
    rows = table[table.task == "reverse"]
    assert set(rows.layer) == {*layers} and set(rows[rows.network == "compiled"].n) == {45} and set(rows[rows.network != "compiled"].n) == {8, 3}
    assert (rows[rows.network == "compiled"].accuracy == 1).all() and rows.accuracy.between(0, 1).all()
    assert rows[rows.network == "compiled"].groupby("layer")["rank"].first().tolist() == [10, 10, 10, 14]
    assert (rows["rank"] <= rows.n).all() and (rows.effective_features[rows.estimator != "distortion"] <= 8 * rows.n[rows.estimator != "distortion"]).all()
    found = table.effective_features.notna()
    assert np.allclose(table.superposition[found], table.effective_features[found] / table.n[found])
    assert rows[rows.network == "scratch"].kept_rank.isna().all() and table[table.task == "planted"].known.tolist()[:3] == pytest.approx([8] * 3)


def test_another_estimator_measures_the_same_networks(table, store):
    "Nothing is trained again, nothing but the reading changes; without a folder the same comes out."
    networks, rows = ({p.name: p.stat().st_mtime_ns for p in (store / part).glob("*.json")} for part in ("networks", "rows"))
    assert len(networks) == 4 and len(rows) == 1 + 4 + 2
    pd.testing.assert_frame_equal(run(TINY, progress=False, store=store), table)
    other = run(replace(TINY, default=replace(QUICK, l1=.9)), progress=False, store=store)
    assert {p.name: p.stat().st_mtime_ns for p in (store / "networks").glob("*.json")} == networks and len([*(store / "rows").glob("*.json")]) == 2 * len(rows)
    assert other.accuracy.equals(table.accuracy) and other["rank"].equals(table["rank"]) and not other.effective_features.equals(table.effective_features)
    pd.testing.assert_frame_equal(other[other.estimator == "released"], table[table.estimator == "released"])
    c = [c for c in cells(TINY) if c.network == "compressed"]
    again = pd.DataFrame([r for x in c for r in Networks().measure(x)])
    same = table[table.network == "compressed"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, same[again.columns], check_dtype=False)
    c = [c for c in cells(replace(TINY, seed=1)) if c.network == "compressed"]
    seeded = pd.DataFrame([r for x in c for r in Networks().measure(x)])
    assert not np.allclose(seeded.effective_features, again.effective_features, equal_nan=True)


@pytest.mark.parametrize("network", ["compressed", "scratch"])
def test_kept_networks_are_those_that_were_trained(reverse, network, tmp_path):
    t = next(c.training for c in cells(TINY) if c.network == network and c.n == 8)
    ids = all_inputs(reverse, 3)
    first, again = (Networks(tmp_path).get(t)(ids) for _ in range(2))
    train = dict(compressed=train_compressed, scratch=train_from_scratch)[network]
    every, more = all_inputs(reverse, 5), dict(noise=t.noise) if network == "compressed" else {}
    assert torch.equal(first, again) and torch.equal(first, train(reverse, every, TASKS["reverse"](every), [8], t.seeds, t.steps, t.batch_size, t.lr, progress=False, **more)(ids))
    kept, = tmp_path.glob("*.json")
    kept.write_text(kept.read_text()[:1000])  # cut short: trained again
    assert torch.equal(Networks(tmp_path).get(t)(ids), first) and len(kept.read_text()) > 1000


KILLED = """
import os, signal, sys
from superposition_lc.experiments import algorithmic
from test_algorithmic import TINY
measure, count = algorithmic.Networks.measure, [0]
def dies(self, cell):
    count[0] += 1
    if count[0] == 4: os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, cell)
dies.__module__, dies.__qualname__ = measure.__module__, measure.__qualname__
algorithmic.Networks.measure = dies
algorithmic.run(TINY, False, sys.argv[1])
"""


def test_killed_and_resumed_is_the_same_table(table, tmp_path, root):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root / "tests", env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").glob("*.json")}
    assert len(kept) == 3
    pd.testing.assert_frame_equal(run(TINY, False, tmp_path), table)
    assert {n: (tmp_path / "rows" / n).stat().st_mtime_ns for n in kept} == kept


def test_report_writes_everything(table, tmp_path):
    text = report(table, TINY, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"figure-5-reverse-{e}.png" for e in ESTIMATORS), "controls.png", "verdict.csv", "evidence.csv"])
    assert "published: about 12" in text and "F read / known" in text and not plt.get_fignums()
    assert len(pd.read_csv(tmp_path / "verdict.csv")) == 5


def test_verdict_on_a_known_table():
    "psi above 1 counts only where every input is answered; the largest layer's mean over seeds."
    common = dict(warning="", task="reverse", estimator="default", rank=3, known=math.nan)
    rows = [dict(common, network="compressed", n=n, seed=s, layer=l, effective_features=F * n, superposition=F, accuracy=a, kept_rank=k)
            for n, s, l, F, a, k in [(8, 0, "layer 0", 1.2, 1., 9), (8, 0, "layer 1", .9, 1., 9), (8, 1, "layer 0", 1.4, 1., 10), (8, 1, "layer 1", .9, 1., 7), (8, 2, "layer 0", 9., .9, 30),
                                     (4, 0, "layer 0", 2., .99, 3)]]
    rows[2]["warning"] = "dense code"
    rows += [dict(common, task="planted", network="orthogonal", n=8, seed=0, layer="", effective_features=8.4, superposition=1.05, known=8.)]
    v = verdict(pd.DataFrame(rows)).set_index("n")
    assert v.loc[8, ["seeds", "solved", "kept_rank"]].tolist() == [3, 2, 10] and v.psi_default[8] == pytest.approx(1.3) and v.control[8] == pytest.approx(1.05)
    assert v.psi_unflagged[8] == pytest.approx(1.2) and v.flagged[8] == .25
    assert v.solved[4] == 0 and math.isnan(v.psi_default[4]) and math.isnan(v.kept_rank[4])


def test_evidence_by_the_rule():
    "Above one only where the interval says so, the control reads lower, nothing is flagged, and equal distortion agrees; unsolved seeds do not count."
    common = dict(warning="", task="sort", network="compressed", rank=3, distinct=5, known=math.nan, accuracy=1., kept_rank=4)
    def layer(n, name, psi, distortion=1.3, **more):
        return [dict(common, n=n, layer=name, seed=s, estimator=e, superposition=v, effective_features=v * n) | more
                for e, values in (("default", psi), ("distortion", [distortion] * 3)) for s, v in enumerate(values)]
    rows = layer(8, "above", [1.2, 1.21, 1.22]) + layer(8, "wide", [1., 1.2, 1.4]) + layer(8, "flagged", [1.2, 1.21, 1.22], warning="dense code") + layer(8, "below", [.8, .81, .82])
    rows += layer(8, "elsewhere", [1.2, 1.21, 1.22], distortion=.9) + layer(4, "bad control", [1.2, 1.21, 1.22]) + layer(8, "unsolved", [1.2, 1.21, 1.22], accuracy=.99)
    rows += [dict(common, task="planted", network="orthogonal", n=n, layer="", seed=s, estimator="default", effective_features=F, superposition=F / n, known=float(n))
             for n, Fs in ((8, (8., 8.4)), (4, (4., 5.))) for s, F in enumerate(Fs)]
    rows += layer(6, "bad exclusive control", [1.2, 1.21, 1.22]) + [dict(rows[-1], network=k, n=6, effective_features=F, known=7.) for k, F in (("orthogonal", 7.), ("exclusive", 9.))]
    e = evidence(pd.DataFrame(rows)).set_index("layer")
    assert e.psi_is.to_dict() == {"above": "above", "wide": "open", "flagged": "open", "below": "not above", "elsewhere": "open", "bad control": "open", "bad exclusive control": "open"}
    assert e.control["above"] == pytest.approx(1.05) and e.flagged["flagged"] == 3 and e.psi["above"] == pytest.approx(1.21) and e.solved["wide"] == 3


@pytest.mark.parametrize("bad, says", [
    (dict(tasks=("parity",)), r"tasks must be out of .* got \['parity'\]"), (dict(widths=()), "widths"), (dict(widths=(1,)), "widths must be at least 2"), (dict(n_seeds=0), "n_seeds"),
    (dict(compress_steps=0), "compress_steps"), (dict(n_sequences=2), "n_sequences must lie in 3..3125"), (dict(n_sequences=9999), "n_sequences"), (dict(distortion=1.), "distortion")])
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        replace(TINY, **bad)


def test_settings_are_plain():
    for config in SCALES.values():
        assert json.loads(json.dumps(dataclasses.asdict(config)))["seed"] == 0
    assert SCALES["paper"].widths == tuple(range(2, 45)) and SCALES["laptop"].n_seeds == 5


def test_figures(table, reverse):
    assert len(plot_residuals(reverse, reverse.encode([[1, 2]]))) == 5
    labels = [t.get_text() for t in plot_residuals(reverse, reverse.encode([[1, 2]]), ["embed"])[0].get_yticklabels()]
    assert labels == ["indices:0", "indices:1", "one", "tokens:1", "tokens:2", "tokens:BOS"]
    shown = plot_attention(reverse, reverse.encode([[1, 2, 3]]), 3).images[0].get_array()
    assert np.allclose(shown, np.eye(4)[[0, 3, 2, 1]], atol=1e-3)
    ax = plot_width(table, "reverse", "scratch", "released")
    assert ax.get_title("left") == "reverse, from scratch" and {"F = N", "published, full width", "layer 0"} <= {t.get_label() for t in ax.lines}
    assert plot_controls(table, "random").get_title("left") == "planted, random"
    for bad, says in [(lambda: plot_width(table, "sort"), r"task must be one of \['planted', 'reverse'\]"), (lambda: plot_width(table, network="x"), "network must be"), (lambda: plot_controls(table, "x"), "network must be"),
                      (lambda: plot_residuals(reverse, reverse.encode([[1]]), ["layers.9.mlp"]), "unknown stages"), (lambda: plot_attention(reverse, reverse.encode([[1]]), 4), "layer must lie in 0..3")]:
        with pytest.raises(ValueError, match=says):
            bad()
