"""The benchmark's two sides compute the same thing; the table is whole. Nothing here is timed."""
import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from superposition_lc import sae as sae_module
from superposition_lc import text as text_module
from superposition_lc.activations import capture
from superposition_lc.experiments import grokking, toy_models
from superposition_lc.llc import local_learning_coefficient
from superposition_lc.entropy import feature_shares
from superposition_lc.sae import SAEConfig, train_sae
from superposition_lc.text import measure_text, residual_error, text_batches


@pytest.fixture(scope="module")
def benchmarks(root):
    "The modules `bench` and `plain`."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")
        import bench
        import plain
        yield bench, plain


@pytest.fixture(scope="module")
def quick(benchmarks, tmp_path_factory):
    "A quick run, kept."
    path = tmp_path_factory.mktemp("bench") / "kept" / "table.json"
    assert benchmarks[0].main(["--quick", "--threads", "1", "--out", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def batches(samples, order, size):
    "A DataLoader over the rows in this order."
    from torch.utils.data import DataLoader, TensorDataset
    return DataLoader(TensorDataset(samples), size, sampler=order)


def test_autoencoders_of_both_sides_are_the_same(benchmarks):
    "Same start, same batches: a stack's members end where the plain loop takes them one by one, with its losses."
    _, plain = benchmarks
    x, config = torch.rand(3, 96, 5, generator=torch.Generator().manual_seed(0)), SAEConfig.released(expansion=8., batch_size=96, epochs=12, patience=99)
    trained = train_sae(x, config, [4], progress=False)
    for i in range(len(x)):
        model = plain.PlainSAE(5, 40)
        model.weight.data = sae_module._initial_rows(5, 40, config, torch.Generator().manual_seed(4))
        losses = plain.train_sae(model, batches(x[i], range(96), 96), 12)
        assert_close(trained.sae.weight[i], model.weight, rtol=1e-4, atol=1e-5)
        assert_close(trained.sae.bias[i], model.bias, rtol=1e-4, atol=1e-5)
        assert trained.history.query("data == @i").loss.tolist() == pytest.approx(losses, rel=1e-4)


def test_what_is_timed_is_what_train_sae_runs(benchmarks):
    "The benchmark's stack, run for an epoch, is `train_sae` for an epoch."
    bench, _ = benchmarks
    x = torch.rand(2, 64, 5, generator=torch.Generator().manual_seed(0))
    stack = bench.stack(x, 8, 16)
    bench.steps(stack, 4)()
    trained = train_sae(x, SAEConfig.released(expansion=8, batch_size=16, epochs=1), [0], progress=False)
    assert_close(stack.sae.weight, trained.sae.weight)
    assert_close(stack.sae.bias, trained.sae.bias)


def test_toy_models_of_both_sides_are_the_same(benchmarks):
    "Same start and features, decaying rate: the same weights."
    _, plain = benchmarks
    S, steps, w = [.2, .9], 30, .7 ** torch.arange(6)
    W, b = toy_models.train_toy_models(S, 6, 3, steps=steps, batch_size=32, seed=1, progress=False)
    for k, s in enumerate(S):
        g = torch.Generator().manual_seed(1)
        start = torch.randn(2, 3, 6, generator=g).mul_(math.sqrt(2 / 9))
        model = plain.PlainToyModel(6, 3)
        model.weight.data = start[k].clone()
        plain.train_toy_model(model, [(((torch.rand(32, 6, generator=g) - s) / (1 - s)).relu(),) for _ in range(steps)], w, steps)
        assert_close(W[k], model.weight.data, rtol=1e-3, atol=1e-4)
        assert_close(b[k], model.bias.data, rtol=1e-3, atol=1e-4)


def test_features_of_both_sides_are_alike(benchmarks):
    "Zero with probability S, else uniform."
    _, plain = benchmarks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = plain.features(20_000, 4, .3)
        ours = toy_models._features(torch.rand(20_000, 4), torch.tensor([.3]))[0]
    for f in (theirs, ours):
        assert (f == 0).float().mean().item() == pytest.approx(.3, abs=.01)
        assert_close(f[f > 0].quantile(torch.tensor([.25, .5, .75])), torch.tensor([.25, .5, .75]), rtol=0, atol=.02)


def test_activations_of_both_sides_are_the_same(benchmarks):
    bench, plain = benchmarks
    for model, x, layer in bench.networks().values():
        ours = capture(model, x[:40], layer, batch_size=16, progress=False)[layer]
        theirs = plain.capture(model, x[:40], model[int(layer)])
        assert_close(ours.values, theirs, rtol=1e-4, atol=1e-5)
        assert ours.values.std() > 0


@pytest.mark.skipif(importlib.util.find_spec("devinterp") is None, reason="devinterp is not installed, the comparison with it does not run: pip install superposition_lc[llc]")
def test_learning_coefficients_of_both_sides_agree(benchmarks):
    "To 10%, at the published setting of the sampler, on a network that is learning its training pairs and on one that knows them."
    c = grokking.GrokkingConfig(p=23, steps=1500, checkpoints=2, n_seeds=1)
    trained, (x, y) = grokking.train_networks(c, progress=False), grokking.pairs(c.p)
    x, y = x[trained.train[0]], y[trained.train[0]]
    sampler = dict(lr=c.llc_lr, nbeta=c.llc_nbeta, localization=c.llc_localization, chains=4, draws=c.llc_draws, batch_size=c.batch_size)
    ours = local_learning_coefficient(grokking.TwoPathMLP(c.p), x, y, {n: p[0] for n, p in trained.parameters.items()}, **sampler, progress=False).table.llc
    for k in range(2):
        net = grokking.TwoPathMLP(c.p)
        net.load_state_dict({n: p[0, k] for n, p in trained.parameters.items()})
        assert ours[k] == pytest.approx(benchmarks[1].learning_coefficient(net, x, y, **sampler), rel=.1)


def test_what_is_not_installed_is_skipped_loudly(benchmarks, monkeypatch):
    "The line stays in the table, with the reason in place of a number."
    bench, _ = benchmarks
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    table = bench.measure(bench.Run(quick=True), ["llc"])
    assert [t["value"] for t in table] == [None, None] and all("devinterp is not installed" in line and "met" not in line.lower() for line in bench.show(table).splitlines()[1:])
    assert json.loads(json.dumps(table)) == table


def test_what_is_timed_is_what_measure_text_runs(benchmarks):
    "The benchmark's batches, taken in, are `measure_text` of its texts; both other sides compute what the pass computes."
    bench, _ = benchmarks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, saes, texts, settings = bench.reading(32, 4, 1, 2)
    whole = measure_text(model, bench.Words(), texts, saes, progress=False, **settings)
    run, seen = text_module._Pass(model, whole.sites, saes, whole.settings, 4000, None), {}
    with torch.no_grad():
        for b in text_batches(texts, bench.Words(), **settings):
            run(b)
            run.run(b.inputs, b.keep, lambda site, x: seen.setdefault(site, []).append(x.clone()))
    for site, sums in whole._sums.items():
        assert torch.equal(sums.shares[0].shares, run.m._sums[site].shares[0].shares)
        assert_close(sums.shares[0].shares, feature_shares(saes[site].encode(torch.cat(seen[site]))))
    table = whole.measurement().table
    assert residual_error(model, dict(input_ids=torch.arange(40).view(2, 20))) < 1e-5
    assert (table.fvu < .3).all() and (table.l0 > .02 * table.n_features).all()


def test_table_is_whole(benchmarks, quick, capsys):
    "One line a figure, numbers that are numbers, and where they come from."
    bench, _ = benchmarks
    names = [t["name"] for t in quick["table"]]
    assert len(set(names)) == len(names)
    assert {"sae_step", "toy_step", "capture", "adversarial_mlp", "adversarial_cnn_floor", "llc", "text_pass", "text_pass_small", "peak_4096", "peak_32768", "figure_3a", *(f"slope_{a}" for a in "DNBKS")} <= set(names)
    for t in quick["table"]:
        if t["name"].startswith("llc") and "skipped" in t: continue  # needs devinterp
        assert math.isfinite(t["value"]) and t["low"] <= t["value"] <= t["high"]
        assert (t["met"] is None) == (t["target"] is None) and all(v > 0 for v in t["seconds"].values())
    assert quick["provenance"]["quick"] and {"versions", "machine", "cores_used", "clock", "time", "instructions"} <= quick["provenance"].keys()
    shown = bench.show(quick["table"]).splitlines()
    assert len(shown) == 1 + len(names)


def test_kept_table_is_of_this_benchmark(root, quick):
    "The docs quote results/bench.json: it has these lines, these targets, and was no quick run."
    kept = json.loads((root / "results" / "bench.json").read_text(encoding="utf-8"))
    aims = lambda table: [(t["name"], t["unit"], t["target"], t["goal"], t["at_most"]) for t in table["table"] if t["target"] is not None]
    assert aims(kept) == aims(quick), "run `make bench`"
    assert not kept["provenance"]["quick"]


def test_threads_and_random_numbers_are_left_alone(benchmarks):
    bench, _ = benchmarks
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    bench.measure(bench.Run(quick=True, threads=2), ["capture"])
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_a_line_by_hand(benchmarks):
    bench, _ = benchmarks
    line = bench.row("a", "what", "x", [1, 5, 3], 3)
    assert (line["value"], line["low"], line["high"], line["rounds"], line["met"]) == (3, 1, 5, 3, True)
    assert not bench.row("a", "", "", [2.9], 3)["met"] and not bench.row("a", "", "", [3.1], 3, at_most=True)["met"]
    assert bench.row("a", "", "", [1.])["met"] is None
    assert "NOT MET" in bench.show([bench.row("a", "", "", [1.], 2)])


def test_slope_is_the_exponent(benchmarks):
    bench, _ = benchmarks
    assert bench.slope([1, 2, 4, 8], [3 * v**.7 for v in (1, 2, 4, 8)]) == pytest.approx(.7)


def test_rounds_take_turns(benchmarks):
    "Every side once a round, first here then there; the first round is not kept."
    bench, _ = benchmarks
    calls = []
    table = bench.Run().rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "baabbaab" and table.shape == (3, 2) and (table.to_numpy() >= 0).all()


@pytest.mark.parametrize("bad", [["--threads", "0"], ["--only", "nothing"], ["--clock", "sun"]], ids=str)
def test_bad_arguments(benchmarks, bad, capsys):
    with pytest.raises(SystemExit):
        benchmarks[0].main(bad)
    assert bad[0] in capsys.readouterr().err
