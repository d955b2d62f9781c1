"""How fast is it? Ratios against plain loops and against the machine's matrix products, all sides taken in turn in one run.

python benchmarks/bench.py [--quick] [--out FILE] [--only NAME ...] [--threads N] [--clock wall|cpu]

A ratio is formed within a round, in which every side runs once, so that a busy machine slows all sides alike; the
table gives the median over rounds and the range. The table is kept as json with its provenance.
"""
import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("MPLBACKEND", "agg")

import pandas as pd
import torch
from torch import nn

import plain
from superposition_lc.activations import capture
from superposition_lc.experiments import grokking, toy_models
from superposition_lc.llc import local_learning_coefficient
from superposition_lc.pretrained import PretrainedSAE
from superposition_lc.runs import atomic_path, provenance
from superposition_lc.sae import SAEConfig, _Member, _run, _Trainer
from superposition_lc.text import _Pass, find_sites, text_batches

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Run:
    "How this run measures."
    quick: bool = False  # small and few: does it work at all?
    threads: int = 1     # for what may use all cores
    clock: str = "wall"

    def seconds(self, fn: Callable) -> float:
        "One call, timed."
        start = CLOCKS[self.clock]()
        fn()
        return CLOCKS[self.clock]() - start

    def rounds(self, sides: dict, repeats: int, threads: int = 1) -> pd.DataFrame:
        "Seconds of every side, one row a round; the order turns round with each, and a first round warms up."
        torch.set_num_threads(threads)
        names, rows = list(sides), []
        for i in range(1 + (1 if self.quick else repeats)):
            took = {name: self.seconds(sides[name]) for name in (names if i % 2 else reversed(names))}
            rows.append({name: took[name] for name in names})
        return pd.DataFrame(rows[1:])


def row(name, what, unit, values, target=None, goal=None, at_most=False, **seconds) -> dict:
    "One line of the table; `values` hold one a round, `seconds` are the medians of the sides."
    values = pd.Series(values, dtype=float)
    value = float(values.median())
    met = None if target is None else bool(value <= target if at_most else value >= target)
    return dict(name=name, what=what, unit=unit, value=value, low=float(values.min()), high=float(values.max()), rounds=len(values), target=target, goal=goal,
                at_most=at_most, met=met, seconds={k: float(v) for k, v in seconds.items()})


def skipped(name, what, unit, target, why) -> dict:
    "The line of what could not be measured here."
    return dict(name=name, what=what, unit=unit, value=None, low=None, high=None, rounds=0, target=target, goal=None, at_most=False, met=None, seconds={}, skipped=why)


def stack(x: torch.Tensor, expansion: float, batch_size: int, config=SAEConfig.released()) -> _Trainer:
    "A trainer of one autoencoder for each data set of x (K, S, N)."
    config = replace(config, expansion=expansion, batch_size=batch_size)
    return _Trainer(x, [_Member(i, config, 0) for i in range(len(x))])


def steps(t: _Trainer, n: int) -> Callable:
    "n steps of a stack, as a call."
    return lambda: _run(t, n, lambda k: None)


# --- against the plain loops

def sae_step(r: Run) -> list[dict]:
    "100 autoencoders of 5 -> 40, batch 128, against one after the other."
    x, epochs, n, found = torch.rand(100, 128 * 20, 5), 1 if r.quick else 10, 5 if r.quick else 100, []
    model, batches = plain.PlainSAE(5, 40), plain.loader(x[0], 128)
    sides = {"plain": lambda: plain.train_sae(model, batches, epochs)}
    for name, K in [("stacked", 100), ("alone", 1)]: sides[name] = steps(stack(x[:K], 8, 128), n if K > 1 else 2 * n)
    per_step = {"plain": epochs * len(batches), "stacked": n * 100, "alone": 2 * n}
    for threads in sorted({1, r.threads}):
        s = r.rounds(sides, 7, threads) / pd.Series(per_step)
        cores = "one core" if threads == 1 else f"{threads} cores"
        aim = dict(target=60, goal=100) if threads == 1 else {}
        found.append(row("sae_step" if threads == 1 else "sae_step_cores", f"SAE step, 100 stacked, 5 to 40, batch 128, {cores}", "x plain loop", s.plain / s.stacked,
                         **aim, plain=s.plain.median(), ours=s.stacked.median()))
        if threads == 1: found.append(row("sae_step_alone", "SAE step, not stacked, 5 to 40, batch 128, one core", "x plain loop", s.plain / s.alone, plain=s.plain.median(), ours=s.alone.median()))
    return found


def toy_step(r: Run) -> list[dict]:
    "100 toy models of 20 features in 5 neurons, batch 256, against one after the other."
    S, n, w = toy_models.sparsities(100), 10 if r.quick else 100, .7 ** torch.arange(20)
    model, data = plain.PlainToyModel(20, 5), plain.loader(plain.features(256 * n, 20, .5), 256)
    drawn = lambda: ((plain.features(256, 20, .5),) for _ in range(n))
    s = r.rounds({"loader": lambda: plain.train_toy_model(model, data, w, n), "drawn": lambda: plain.train_toy_model(model, drawn(), w, n),
                  "stacked": lambda: toy_models.train_toy_models(S, steps=n, progress=False)}, 7) / n
    s["stacked"] /= len(S)
    one = "toy-model step, 100 stacked, 20 in 5, batch 256, one core"
    return [row("toy_step", one, "x plain loop", s.loader / s.stacked, 10, plain=s.loader.median(), ours=s.stacked.median()),
            row("toy_step_drawn", one + ", against features drawn on the way", "x plain loop", s.drawn / s.stacked, plain=s.drawn.median(), ours=s.stacked.median())]


def networks() -> dict:
    "{name: (network, its input, layer)}: a perceptron on 8 x 8 digits, a convolutional network on 28 x 28 images."
    mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    cnn = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
    return {"perceptron": (mlp, torch.rand(4096, 64), "3"), "convolutional network": (cnn, torch.rand(1024, 1, 28, 28), "1")}


def capturing(r: Run) -> list[dict]:
    "Activations of a layer, against one input at a time."
    found = []
    for name, (model, x, layer) in networks().items():
        x = x[:len(x) // 16] if r.quick else x
        s = r.rounds({"plain": lambda: plain.capture(model, x, model[int(layer)]), "ours": lambda: capture(model, x, layer, progress=False)}, 5) / len(x)
        found.append(row("capture" if name == "perceptron" else "capture_conv", f"capture, {name}, one core", "x plain loop", s.plain / s.ours,
                         10 if name == "perceptron" else None, plain=s.plain.median(), ours=s.ours.median()))
    return found


def learning_coefficient(r: Run) -> list[dict]:
    "The local learning coefficient of 100 checkpoints in one stack, against devinterp's one by one, at the sampler's published setting; not timed where devinterp is not installed."
    c, what = grokking.GrokkingConfig(), "local learning coefficient, a checkpoint of the grokking network, 2 chains of 500 draws, one core"
    aims = [("llc", what, 15), ("llc_autograd", what + ", without a gradient of its own", None)]
    if importlib.util.find_spec("devinterp") is None: return [skipped(name, what, "x devinterp", target, "devinterp is not installed: pip install superposition_lc[llc]") for name, what, target in aims]
    K, draws = (2, 5) if r.quick else (c.checkpoints, c.llc_draws)
    (x, y), net = grokking.pairs(c.p), grokking.TwoPathMLP(c.p, c.embed, c.width)
    rows = torch.randperm(len(x))[:round(c.train_fraction * len(x))]
    x, y, stack = x[rows], y[rows], {n: p.detach().expand(K, *p.shape).clone() for n, p in net.named_parameters()}
    sampler = dict(lr=c.llc_lr, nbeta=c.llc_nbeta, localization=c.llc_localization, chains=c.llc_chains, draws=draws, batch_size=c.batch_size)
    ours = lambda **how: local_learning_coefficient(net, x, y, stack, **sampler, **how, progress=False)
    s = r.rounds({"devinterp": lambda: plain.learning_coefficient(net, x, y, **sampler), "ours": lambda: ours(gradients=grokking.grokking_gradients), "autograd": ours}, 3)
    s[["ours", "autograd"]] /= K
    return [row(name, what, "x devinterp", s.devinterp / s[side], target, devinterp=s.devinterp.median(), ours=s[side].median()) for (name, what, target), side in zip(aims, ("ours", "autograd"))]


# --- text through a network, against its parts

class Words:
    "A tokenizer that costs nothing: the words are the ids."
    pad_token_id, all_special_ids = 0, ()

    def __call__(self, text, **kwargs):
        ids = [int(word) for word in text.split()]
        return dict(input_ids=ids, special_tokens_mask=[0] * len(ids))


def reading(width: int, expansion: int, n_layers: int, n_batches: int, tokens: int = 64, batch_size: int = 16) -> tuple:
    "(network, autoencoders of all sites, texts, settings of the pass); each autoencoder reconstructs well, and one code in fifty is active."
    model = plain.PlainTransformer(1000, width, n_layers)
    texts = [" ".join(map(str, row.tolist())) for row in torch.randint(1000, (n_batches * batch_size, tokens))]
    settings, sites = dict(max_tokens=tokens, batch_size=batch_size, n_groups=2), find_sites(model)
    inputs = torch.tensor([list(map(int, t.split())) for t in texts[:batch_size]])
    seen = capture(model, inputs, [s.module for s in sites], progress=False)
    return model, {s.name: autoencoder(seen[s.module].values, expansion) for s in sites}, texts, settings


def autoencoder(x: torch.Tensor, expansion: int) -> PretrainedSAE:
    "Both ends of each axis of a random basis, and far more features that fire seldom and add little."
    n, rest = x.shape[1], (expansion - 2) * x.shape[1]
    basis, more, scale = torch.linalg.qr(torch.randn(n, n)).Q, nn.functional.normalize(torch.randn(rest, n), dim=1), x.square().mean().sqrt()
    limits = (x[:256] / scale @ more.T).quantile(.98, 0)
    w = torch.cat([basis, -basis, more])
    return PretrainedSAE(w, torch.cat([torch.full((2 * n,), -.1), -limits]), w * torch.cat([torch.ones(2 * n, 1), torch.full((rest, 1), 1e-3)]), torch.zeros(n), scale=scale.item())


def text_pass(r: Run) -> list[dict]:
    "Batches of text measured at all sites, against the network's forward pass and the encoders' codes by themselves."
    found = []
    for name, width, expansion, n_layers, repeats in [("text_pass", 512, 64, 1, 5), ("text_pass_small", 384, 8, 6, 9)]:
        if r.quick: width, expansion, n_layers = 32, expansion // 2, 1
        model, saes, texts, settings = reading(width, expansion, n_layers, n_batches=2)
        sites, batches, seen = find_sites(model), list(text_batches(texts, Words(), **settings)), []
        run = _Pass(model, sites, saes, settings | dict(test_every=32), 4000, None)
        run.m.n_batches = 1  # what is done once a text, on its first batch, is left out
        for b in batches: run.run(b.inputs, b.keep, lambda site, x: seen.append((saes[site], x.clone())))
        sides = {"network": lambda: [model(b.input_ids) for b in batches], "encoders": lambda: [sae.encode(x) for sae, x in seen], "ours": lambda: [run(b) for b in batches]}
        with torch.no_grad(): s = r.rounds(sides, repeats)
        what = f"text measured at {len(sites)} sites, {width} neurons, {expansion * width} features, one core"
        found.append(row(name, what, "x network and encoders", s.ours / (s.network + s.encoders), at_most=True, **s.median()))
    return found


def adversarial_step(r: Run) -> list[dict]:
    "A training step against PGD: over one with torchattacks' own call, and over the floor, as many clean steps as the attack has."
    from torchattacks import PGD
    from superposition_lc.experiments.adversarial import AdversarialConfig, robust_loss
    k, eps, B, ce, found = 3 if r.quick else 10, .1, 64 if r.quick else 256, nn.functional.cross_entropy, []
    config = AdversarialConfig(attack_steps=k)
    for name, what, model in [("mlp", "perceptron of 128", nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))),
                              ("cnn", "16 channels of 5 x 5", nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 196, 10)))]:
        x, y = torch.rand(B, 1, 28, 28), torch.randint(10, (B,))
        sgd = torch.optim.SGD(model.parameters(), 0.)
        def step(loss):
            sgd.zero_grad()
            loss().backward()
            sgd.step()
        def theirs(): return .5 * ce(model(x), y) + .5 * ce(model(PGD(model, eps=eps, alpha=2.5 * eps / k, steps=k)(x, y)), y)
        def floor():
            for _ in range(k): step(lambda: ce(model(x), y))
        s = r.rounds({"torchattacks": lambda: step(theirs), "ours": lambda: step(lambda: robust_loss(model, x, y, eps, config)), "floor": floor}, 7)
        what = f"adversarial step, {what}, PGD-{k}, batch {B}, one core"
        found.append(row(f"adversarial_{name}", what, "of torchattacks' time", s.ours / s.torchattacks, **s.median()))
        found.append(row(f"adversarial_{name}_floor", what + f", over {k} clean steps", "of the floor", s.ours / s.floor, **s.median()))
    return found


# --- against the machine

def peak_sides(N: int, D: int, B: int, quick: bool) -> tuple[dict, dict]:
    "Matrix products whose best rate counts as the machine's: large squares, and the step's own forward product. (calls, their flops)."
    M = 512 if quick else 2048
    a, b, c, d = torch.randn(M, M), torch.randn(M, M), torch.randn(B, N), torch.randn(N, D)
    square, own = torch.empty(M, M), torch.empty(B, D)
    return {"square": lambda: torch.mm(a, b, out=square), "own": lambda: torch.mm(c, d, out=own)}, {"square": 2. * M**3, "own": 2. * B * N * D}


def of_peak(r: Run) -> list[dict]:
    "A large autoencoder's step: the five products it needs, over its time, over the best rate of any product in the round."
    found = []
    for D, B, target, repeats in [(4096, 1024, .90, 5), (32768, 512, .85, 3)]:
        N, name = 512, f"peak_{D}"
        if r.quick: D, B, N = D // 16, B // 4, 128
        x, n = torch.rand(4 * B, N), 4 if D < 10_000 else 1
        calls, flops = peak_sides(N, D, B, r.quick)
        model, batches = plain.PlainSAE(N, D), plain.loader(x[:n * B], B)
        still = SAEConfig.released(lr=1e-6)  # so that as many codes stay active as there are
        full, few = (stack(x[None], D / N, B, still) for _ in range(2))
        few.sae.bias.data = -(x[:B] @ few.sae.weight.data.mT).topk(1 + B // 100, 1).values[:, -1]  # each feature fires on every hundredth sample
        calls |= {"ours": steps(full, n), "plain": lambda: plain.train_sae(model, batches, 1), "few": steps(few, n)}
        flops |= dict.fromkeys(("ours", "plain", "few"), 10. * B * N * D * n)
        rate = pd.Series(flops) / r.rounds(calls, repeats, r.threads)
        peak, seconds = rate[["square", "own"]].max(axis=1), {k: 10. * B * N * D / rate[k].median() for k in ("plain", "ours", "few")}
        what = f"SAE step, {N} to {D}, batch {B}, {r.threads} core{'s' * (r.threads > 1)}"
        found.append(row(name, what, "of matmul peak", rate.ours / peak, target, **seconds, products=10. * B * N * D / peak.median()))
        found.append(row(name + "_few", what + ", 1% of codes active", "of matmul peak", rate.few / peak, **seconds))
        found.append(row(name + "_plain", what + ", plain loop", "of matmul peak", rate.plain / peak, **seconds))
    return found


# --- how cost grows

def slope(x, y) -> float:
    "Of log y on log x."
    x, y = (pd.Series(v, dtype=float).map(math.log) for v in (x, y))
    return float(x.cov(y) / x.var())


AXES = {"features D": ("D", (256, 512, 1024, 2048)), "neurons N": ("N", (64, 128, 256, 512)), "batch": ("B", (64, 128, 256, 512)),
        "autoencoders stacked": ("K", (4, 8, 16, 32)), "samples, an epoch": ("S", (2048, 4096, 8192, 16384))}


def growth(r: Run) -> list[dict]:
    "Slope of log cost against log size, one size varied at a time: 1 is linear."
    found = []
    for what, (axis, sizes) in AXES.items():
        base = dict(D=512, N=64, B=128, K=1, S=2048) | (dict(D=64, N=8) if axis in "KS" else {}) | (dict(B=256) if axis == "D" else {})
        if r.quick: sizes = sizes[:2]
        calls = {}
        for v in sizes:
            s = base | {axis: v}
            t = stack(torch.rand(s["K"], s["S"], s["N"]), s["D"] / s["N"], s["B"])
            calls[v] = steps(t, s["S"] // s["B"] if axis == "S" else 2 if r.quick else 20)
        took = r.rounds(calls, 7)
        found.append(row(f"slope_{axis}", f"cost against {what}, {sizes[0]} to {sizes[-1]}, one core", "slope", [slope(sizes, list(y)) for _, y in took.iterrows()], 1.05,
                         at_most=True, **{str(v): took[v].median() for v in sizes}))
    return found


# --- a figure, from nothing

def figure_3a(r: Run) -> list[dict]:
    "Toy models, their autoencoders, the measure and the figure, with the default estimator and one seed."
    torch.set_num_threads(r.threads)
    c = toy_models.SCALES["smoke" if r.quick else "laptop"]
    c = replace(c, n_seeds=1, estimators=c.estimators[:1], swept=(), sweep_models=0)
    tables, parts, true = [], {}, toy_models._models
    def models(*args):
        out = []
        parts["toy models"] = r.seconds(lambda: out.append(true(*args)))
        return out[0]
    toy_models._models = models
    try: whole = r.seconds(lambda: tables.append(toy_models.validate(c, progress=False)))
    finally: toy_models._models = true
    with TemporaryDirectory() as out:
        parts["figure"] = r.seconds(lambda: toy_models.figure_3a(tables[0], c.estimators[0][0]).savefig(Path(out) / "3a.png"))
    parts["autoencoders and measure"] = whole - parts["toy models"]
    what = f"Fig. 3a end to end: {c.n_models} models, {c.n_models} SAEs, default estimator, {r.threads} core{'s' * (r.threads > 1)}"
    return [row("figure_3a", what, "seconds", [whole + parts["figure"]], 60, 20, at_most=True, **parts)]


BENCHES = dict(sae_step=sae_step, toy_step=toy_step, capture=capturing, adversarial=adversarial_step, text=text_pass, peak=of_peak, growth=growth, llc=learning_coefficient, figure_3a=figure_3a)


def show(table: list[dict]) -> str:
    "The table as text."
    number = lambda v: "" if v is None else f"{v:.3g}"
    lines = [("", "ours", "range", "unit", "target", "goal", "")]
    lines += [(t["what"], number(t["value"]), f"{number(t['low'])}..{number(t['high'])}" if t["rounds"] else "", t["unit"], (("<= " if t["at_most"] else ">= ") + number(t["target"])) if t["target"] else "",
               number(t["goal"]), "SKIPPED: " + t["skipped"] if "skipped" in t else {None: "", True: "met", False: "NOT MET"}[t["met"]]) for t in table]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def measure(r: Run, names) -> list[dict]:
    "The lines of the benchmarks `names`; threads and random numbers are afterwards as before."
    table, before, start = [], torch.get_num_threads(), time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name in names:
                table += BENCHES[name](r)
                print(f"{name}: done after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    finally: torch.set_num_threads(before)
    return table


def main(args: list[str]) -> int:
    "Measure, show and keep; 0 even where a target is missed: the table says so."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and once: checks that everything runs, its figures mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the table is kept (default: results/bench.json; nowhere with --quick or --only)")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), metavar="NAME", help=f"some of: {', '.join(BENCHES)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores for what may use several (default: all)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, steadier on a busy machine with --threads 1")
    a = parser.parse_args(args)
    if a.threads < 1: parser.error(f"--threads must be at least 1, got {a.threads}")
    out = a.out or (None if a.quick or a.only != list(BENCHES) else ROOT / "results" / "bench.json")
    r, start = Run(a.quick, a.threads, a.clock), time.perf_counter()
    table = measure(r, a.only)
    kept = dict(table=table, provenance=provenance(quick=a.quick, clock=a.clock, cores_used=a.threads, instructions=torch.backends.cpu.get_cpu_capability(),
                                                   seconds=round(time.perf_counter() - start)))
    if out:
        with atomic_path(out) as path: path.write_text(json.dumps(kept, indent=1) + "\n")
    print(show(table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
