"""Cells and the sweep: nothing finished is lost or computed twice, one cell's failure is its own, results do not depend on where they run."""
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from joblib import parallel_config
from safetensors.torch import load_file, save_file
from torch import nn

from superposition_lc.activations import capture
from superposition_lc.cells import FailedCells, cell_key, run_cells
from superposition_lc.cli import main
from superposition_lc.data import load_dataset
from superposition_lc.experiments import adversarial, sweep
from superposition_lc.experiments.sweep import (ARCHITECTURES, READINGS, SCALES, Cell, Grid, SweepConfig, changes, measure_cell,
                                                measured_layers, network, participation_ratio, plot_changes, reading, report, run, tidy, trained)
from superposition_lc.measurement import measure_activations
from superposition_lc.sae import SAEConfig

replace = dataclasses.replace
QUICK = dict(default=SAEConfig(expansion=2, steps=40, max_rounds=2, refine_steps=30, warmup=10), released=SAEConfig.released(expansion=2, epochs=3))
TINY = Cell(n_classes=2, width=6, n_train=120, n_test=60, attack_steps=2, eval_steps=3, epochs=6, batch_size=20, n_samples=120, sae_seeds=2,
            octaves=(-2, 0, 3, 5), **QUICK)
CONFIG = SweepConfig((Grid(n_classes=(2, 3), networks=(("mlp1", 6),), eps=(0., .1), cell=TINY),), n_seeds=1)


@dataclass(frozen=True)
class Number:
    n: int
    fail: str = ""


def double(cell):
    if cell.fail == "raise": raise ValueError("no twice of this")
    if cell.fail == "die": os.kill(os.getpid(), signal.SIGKILL)
    return {"twice": 2 * cell.n, "pair": (cell.n, math.pi)}


# --- cells

def test_values_come_in_order_and_as_they_are_read_back(tmp_path):
    cells = [Number(n) for n in (3, 1, 2)]
    fresh, found = (run_cells(double, cells, tmp_path, progress=False) for _ in range(2))
    assert fresh.values == found.values == [{"twice": 2 * n, "pair": [n, math.pi]} for n in (3, 1, 2)]
    assert (fresh.found, found.found) == (0, 3) and len(list(tmp_path.iterdir())) == 3
    assert run_cells(double, cells, progress=False).values == fresh.values and fresh.complete() == fresh.values


def test_a_file_says_what_it_is(tmp_path):
    run_cells(double, [Number(3)], tmp_path, "7", progress=False)
    d = json.loads((tmp_path / f"{cell_key(double, Number(3), '7')}.json").read_text())
    assert d["cell"] == {"n": 3, "fail": ""} and d["version"] == "7" and d["function"].endswith("double") and d["seconds"] >= 0 and "torch" in d["about"]["versions"]


def test_another_version_setting_or_function_is_another_cell(tmp_path):
    run_cells(double, [Number(3)], tmp_path, "1", progress=False)
    assert run_cells(double, [Number(3)], tmp_path, "1", progress=False).found == 1
    for function, cell, version in [(double, Number(3), "2"), (double, Number(4), "1"), (measure_nothing, Number(3), "1")]:
        assert run_cells(function, [cell], tmp_path, version, progress=False).found == 0


def measure_nothing(cell): return []


@pytest.mark.parametrize("damage", [lambda p: p.write_text(p.read_text()[:-9]), lambda p: p.write_text("[]"), lambda p: p.write_bytes(b"\xff\x00"), lambda p: p.write_text(""),
                                    lambda p: p.write_text(p.read_text().replace('"n": 3', '"n": 4')), lambda p: p.unlink()])
def test_damaged_files_are_computed_again(tmp_path, damage):
    first = run_cells(double, [Number(3)], tmp_path, progress=False)
    path, = tmp_path.iterdir()
    damage(path)
    again = run_cells(double, [Number(3)], tmp_path, progress=False)
    assert again.found == 0 and again.values == first.values and run_cells(double, [Number(3)], tmp_path, progress=False).found == 1


def test_a_failed_cell_is_reported_and_the_rest_goes_on(tmp_path, capfd):
    cells = [Number(1), Number(2, "raise"), Number(3)]
    r = run_cells(double, cells, tmp_path)
    assert [v and v["twice"] for v in r.values] == [2, None, 6] and len(list(tmp_path.iterdir())) == 2
    f = r.failures.iloc[0]
    assert len(r.failures) == 1 and f.cell == cells[1] and f.error == "ValueError: no twice of this" and "in double" in f.traceback
    assert "failed: Number(n=2, fail='raise')" in capfd.readouterr().err
    with pytest.raises(FailedCells, match=r"(?s)1 of 3 cells failed \(the other 2 are kept in .*Number\(n=2, fail='raise'\).*no twice of this") as e:
        r.complete()
    assert e.value.failures is r.failures


def test_a_cell_that_takes_its_process_down_is_found_out(tmp_path):
    "Its neighbours in flight are finished."
    cells = [Number(0), Number(1, "die")]
    r = run_cells(double, cells, tmp_path, n_jobs=2, progress=False)
    assert [v and v["twice"] for v in r.values] == [0, None] and r.failures.cell.tolist() == [cells[1]]
    assert "its process died" in r.failures.error[0]


@pytest.mark.parametrize("bad, says", [(dict(cells=[Number(1), Number(1)]), "must be different"), (dict(cells=[Number(math.nan)]), "plain, finite"), (dict(cells=[3]), "dataclass"),
                                       (dict(cells=[Number(object())]), "plain, finite")], ids=["twice", "nan", "int", "object"])
def test_bad_cells_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        run_cells(double, **bad)


def test_a_result_that_is_not_plain_is_the_cells_failure():
    assert "not JSON serializable" in run_cells(lambda c: object(), [Number(1)], progress=False).failures.error[0]


def test_a_store_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run_cells(lambda c: pytest.fail("computed"), [Number(1)], tmp_path / "file", progress=False)


DRIVER = """
    import os, random, signal, sys, time
    from dataclasses import dataclass
    import joblib
    from superposition_lc.cells import cell_key, run_cells
    folder, (n_cells, kills, n_jobs), pause = sys.argv[1], map(int, sys.argv[2:5]), float(sys.argv[5])

    @dataclass(frozen=True)
    class Slow:
        n: int

    def work(cell):
        with open(folder + "/log", "a") as f: f.write(f"{cell.n}\\n")
        time.sleep(pause)
        return cell.n**2

    def started(): return open(folder + "/log").read().split() if os.path.exists(folder + "/log") else []
    cells, rng = [Slow(n) for n in range(n_cells)], random.Random(0)
    finished = lambda: {n for n in range(n_cells) if os.path.exists(f"{folder}/store/{cell_key(work, Slow(n))}.json")}
    for k in range(kills + 1):
        before, there = len(started()), finished()
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)  # its processes are killed with it
            try: run_cells(work, cells, folder + "/store", n_jobs=n_jobs, progress=False)
            finally: os.killpg(0, signal.SIGKILL)  # idle workers would hold the output open
        if k < kills:  # while at work, at a random moment
            give_up = time.monotonic() + 60
            while len(started()) == before and time.monotonic() < give_up: time.sleep(.002)
            time.sleep(rng.uniform(0, 3 * pause))
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        new = [int(n) for n in started()[before:]]
        assert not there & {*new}, "a finished cell was computed again"
        assert there <= finished(), "a finished cell was lost"
        print(len(new), len(finished()) - len(there), flush=True)
    last = run_cells(work, cells, folder + "/store", n_jobs=1, progress=False)
    print(last.found, last.values == [n**2 for n in range(n_cells)])
"""


@pytest.mark.parametrize("n_cells, kills, n_jobs, pause", [(24, 10, 1, .03), (12, 2, 2, .4)], ids=["one process", "two processes"])
def test_killed_at_random_it_loses_nothing(tmp_path, n_cells, kills, n_jobs, pause):
    "Every kill, of the run with all its processes, costs the cells in flight and no more."
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    said = subprocess.run([sys.executable, "-W", "ignore", tmp_path / "driver.py", tmp_path, *map(str, (n_cells, kills, n_jobs, pause))], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=120)
    assert said.returncode == 0, said.stderr[-3000:]
    *runs, same = said.stdout.split("\n")[:-1]
    runs = [tuple(map(int, r.split())) for r in runs]
    assert same == f"{n_cells} True" and len(runs) == kills + 1 and sum(done for _, done in runs) == n_cells
    assert all(0 <= started - done <= n_jobs for started, done in runs) and sum(s for s, _ in runs) > n_cells  # some were in flight


# --- networks that are kept

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the network of TINY at radius .1."
    folder = tmp_path_factory.mktemp("networks")
    trained(replace(TINY, eps=.1), networks=folder)
    return folder


def weights(model):
    return [p.tolist() for p in model.state_dict().values()]


def test_a_network_is_trained_once_for_all_ways_to_measure_it(folder, monkeypatch):
    cell = replace(TINY, eps=.1)
    model, scores = trained(cell)
    monkeypatch.setattr(sweep, "train_robust", lambda *a: pytest.fail("trained again"))
    for again in (cell, cell.training(), replace(cell, sae_seeds=5, n_samples=50, default=SAEConfig(l1=.3))):
        found, said = trained(again, networks=folder)
        assert weights(found) == weights(model) and json.dumps(said) == json.dumps(scores) and not found.training
    rows = measure_cell(cell, networks=folder)
    monkeypatch.undo()
    assert json.dumps(rows) == json.dumps(measure_cell(cell)) and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("change", [dict(seed=1), dict(eps=.2), dict(weighting="released"), dict(attack="fgsm"), dict(attack_steps=1), dict(eval_steps=4), dict(epochs=5), dict(n_train=119),
                                    dict(width=5)], ids=str)
def test_other_training_is_another_network(folder, monkeypatch, change, tmp_path):
    there, seen = shutil.copytree(folder, tmp_path / "networks"), []
    monkeypatch.setattr(sweep, "train_robust", lambda m, *a: (seen.append(m), m)[1])
    trained(replace(TINY, **{"eps": .1, **change}), networks=there)
    assert len(seen) == 1 and len(list(there.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-40]), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"x" * 99), lambda p: p.unlink(),
                                    lambda p: save_file(load_file(p), p)], ids=["cut", "empty", "other", "gone", "no scores"])
def test_a_damaged_network_is_trained_again(folder, damage):
    cell, path = replace(TINY, eps=.1), next(folder.iterdir())
    model, scores = trained(cell, networks=folder)
    damage(path)
    again, said = trained(cell, networks=folder)
    assert weights(again) == weights(model) and json.dumps(said) == json.dumps(scores) and [path] == list(folder.iterdir())


def test_run_keeps_networks_in_the_store(tmp_path, monkeypatch):
    config = replace(CONFIG, grids=(replace(CONFIG.grids[0], n_classes=(2,)),))
    first = run(config, progress=False, store=tmp_path)
    assert len(list((tmp_path / "networks").glob("*.safetensors"))) == len(config.cells()) == 2
    for p in tmp_path.glob("*.json"): p.unlink()
    monkeypatch.setattr(sweep, "train_robust", lambda *a: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(run(config, progress=False, store=tmp_path), first, check_exact=True)


# --- the sweep

@pytest.fixture(scope="module")
def table():
    return run(CONFIG, progress=False)


def test_one_row_a_network_layer_input_and_reading(table):
    keys = ["dataset", "n_classes", "architecture", "width", "eps", "seed", "layer", "inputs", "reading"]
    assert list(table)[:9] == keys and not table.duplicated(keys).any() and len(table) == 2 * 2 * 2 * 3
    assert set(table.reading) == {*READINGS} and set(table.inputs) == {"clean", "attacked"} and set(table.layer) == {"relu1"}
    assert table.effective_features.map(math.isfinite).all() and (table.n_parameters == 64 * 6 + 6).all() and (table.n_neurons == 6).all()
    assert (table.low <= table.effective_features).all() and (table.effective_features <= table.high).all()
    assert table[["accuracy", "robust_accuracy", "common_accuracy", "fgsm_accuracy"]].stack().between(0, 1).all() and table.autoattack_accuracy.isna().all()
    assert (table.attack == "pgd").all() and (table.weighting == "even").all() and table.attack_warning.map(type).eq(str).all()
    assert table.alive_units.between(1, 6).all()
    assert table.participation_ratio.between(1, 6).all() and (table.scale > 0).all() and (table.superposition == table.effective_features / 6).all()


def test_without_attack_clean_and_attacked_are_one(table):
    a, b = (table[(table.eps == 0) & (table.inputs == kind)].drop(columns="inputs").reset_index(drop=True) for kind in ("clean", "attacked"))
    pd.testing.assert_frame_equal(a, b)
    assert (a.accuracy == a.robust_accuracy).all()


def test_rows_are_the_measurement_of_the_network(table):
    "The cell's network, trained and measured by hand."
    cell = replace(TINY, eps=.1)
    data = load_dataset("digits", 2, 120, 60, progress=False)
    model = adversarial.train_robust(network("mlp1", 6, (1, 8, 8), 2), data, .1, cell)
    x = adversarial.attack(model, data.x_train, data.y_train, .1, 2, 0)
    a = capture(model, x, "relu1", progress=False)["relu1"]
    rows = table[(table.n_classes == 2) & (table.eps == .1) & (table.inputs == "attacked")].set_index("reading")
    for name in ("released", "default"):
        found = measure_activations({"a": capture(model, data.x_train, "relu1", progress=False)["relu1"], "b": a}, getattr(cell, name), 2, progress=False).table.iloc[1]
        for c in ("effective_features", "low", "high", "l0", "fvu", "dead_fraction"): assert rows.loc[name, c] == pytest.approx(found[c], rel=1e-3), (name, c)
        assert rows.loc[name, "warning"] == found.warning and rows.loc[name, "n_features"] == found.n_features
    assert rows.accuracy.iloc[0] == adversarial.accuracy(model, data.x_test, data.y_test)


def test_scores_are_those_of_the_attacks():
    cell = replace(TINY, eps=.1, autoattack=20, autoattack_steps=5)
    data = load_dataset("digits", 2, 120, 60, progress=False)
    model, s = trained(cell)
    at = lambda eps, steps, method, n=None: adversarial.accuracy(model, adversarial.attack(model, data.x_test[:n], data.y_test[:n], eps, steps, 0, method), data.y_test[:n])
    assert list(s) == ["accuracy", "robust_accuracy", "common_accuracy", "fgsm_accuracy", "autoattack_accuracy", "attack_warning"]
    assert s["robust_accuracy"] == s["common_accuracy"] == at(.1, 3, "pgd") and s["fgsm_accuracy"] == at(.1, 3, "fgsm") and s["autoattack_accuracy"] == at(.1, 5, "autoattack", 20)
    t = adversarial.check_attacks(model, data.x_test, data.y_test, (.1, .5), 3)
    assert {*s["attack_warning"].split("; ")} == {w for ws in t.warning for w in ws.split("; ")}


def test_equal_distortion_is_equal(table):
    "One FVU in a condition; away from it only with a word."
    for _, t in table[table.reading == "equal_distortion"].groupby("n_classes"):
        assert t[~t.warning.str.contains("read at FVU|no curve")].fvu.nunique() <= 1


def curve(height, fvus):
    "Points of F = height / sqrt(FVU), as a cell keeps them, for two dictionaries."
    return [dict(l1=float(i), seed=s, n_neurons=6, effective_features=height / f**.5, stderr=.01, fvu=f, l0=1., dead_fraction=0., converged=True, warning="")
            for s in (0, 1) for i, f in enumerate(fvus)]


@pytest.mark.parametrize("fvus, at, said", [([.02, .05, .2, .4], .1, ""), ([.15, .2, .4], .15, ""), ([.3, .4], .3, "read at FVU 0.06, others at 0.1")])
def test_planted_curves_are_read_at_one_distortion(fvus, at, said):
    "The sweep's FVU; the nearest that all reach; its own, with a word, where there is none."
    q = dict(n_features=12, effective_features=1., low=1., high=1., l0=1., fvu=.5, dead_fraction=0., converged=True, warning="")
    make = lambda height, f: [dict(layer="relu1", inputs=i, n_parameters=9, n_neurons=6, scale=1., readings=dict(released=q, default=q), curve=curve(height, f)) for i in ("clean", "attacked")]
    cells = [replace(TINY, eps=e) for e in (0., .1)]
    t = tidy(cells, [make(1., [.01, .03, .06] if said else [.01, .03, .2, .5])[:1], make(3., fvus)], .1)
    t = t[t.reading == "equal_distortion"]
    own = {0.: .06 if said else at, .1: at}
    assert t.fvu.tolist() == pytest.approx([own[e] for e in t.eps])
    assert t.effective_features.tolist() == pytest.approx([{0.: 1, .1: 3}[e] / own[e]**.5 for e in t.eps], rel=.02)
    assert set(t[t.eps == 0].warning) == {said} and t.inputs.tolist() == ["clean", "attacked"] * 2


def test_a_cell_leaves_threads_and_random_numbers_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    a, b = (measure_cell(replace(TINY, eps=.1)) for _ in range(2))
    assert json.dumps(a) == json.dumps(b) and torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_a_layer_of_dead_units_is_reported(monkeypatch):
    monkeypatch.setattr(sweep, "train_robust", lambda model, *a: model.requires_grad_(False).fc1.bias.fill_(-1e3) is not None and model)
    cells = [replace(TINY, eps=e) for e in (0., .1)]
    t = tidy(cells, [measure_cell(c) for c in cells])
    assert (t.effective_features == 0).all() and t.warning.str.startswith("silent").all() and (t.alive_units == 0).all() and (t.participation_ratio == 0).all()
    assert changes(t).ratio.isna().all()


def test_convolutional_layers_are_measured_by_position():
    rows = measure_cell(replace(TINY, architecture="cnn1", width=3, eps=.1, epochs=2))
    assert [(r["inputs"], r["layer"], r["n_neurons"], r["n_samples"], r["n_parameters"]) for r in rows] == [(i, "relu1", 3, 120, 78) for i in ("clean", "attacked")]
    assert {*rows[0]["readings"]} == {"released", "default"} and len(rows[0]["curve"]) == 2 * len(TINY.octaves)


def test_participation_ratio():
    x = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    assert participation_ratio(x) == pytest.approx((values.sum()**2 / values.square().sum()).item()) and participation_ratio(3 * x + 5) == pytest.approx(participation_ratio(x))


@pytest.mark.parametrize("architecture, width, names, total", [
    ("mlp1", 8, ["relu1"], 64 * 8 + 8 + 30 - 3), ("mlp3", 2, ["relu1", "relu2", "relu3"], 64 * 8 + 8 + 36 + 10 + 9), ("cnn1", 4, ["relu1"], 104 + 4 * 16 * 3 + 3),
    ("cnn2", 2, ["relu1", "relu2", "relu3"], 20 + 76 + 4 * 4 * 8 + 8 + 27), ("resnet18", .0625, ["relu1", "layer1", "layer2", "layer3", "layer4"], None)])
def test_networks(architecture, width, names, total):
    net = network(architecture, width, (1, 8, 8), 3)
    assert list(measured_layers(net)) == names and net(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    if total: assert sum(p.numel() for p in net.parameters()) == total
    head = sum(p.numel() for p in net.head.parameters())
    assert sum(measured_layers(net).values()) + head == sum(p.numel() for p in net.parameters())
    assert torch.equal(next(net.parameters()), next(network(architecture, width, (1, 8, 8), 3).parameters()))
    assert not torch.equal(next(net.parameters()), next(network(architecture, width, (1, 8, 8), 3, 1).parameters()))


def test_resnet18_is_the_usual_one():
    assert sum(p.numel() for p in network("resnet18", 1, (3, 32, 32), 10).parameters()) == 11_173_962
    c = 16
    stage = 2 * (2 * 9 * c * c + 2 * 2 * c)
    assert measured_layers(network("resnet18", .25, (3, 32, 32), 10))["layer1"] == stage


# --- settings and errors

def test_scales():
    assert list(SCALES) == ["smoke", "laptop", "paper"] and {c.dataset for c in SCALES["smoke"].cells()} == {"digits"}
    for s in SCALES.values():
        cells = s.cells()
        assert len(set(cells)) == len(cells) and all(c.eps >= 0 for c in cells) and min(c.seed for c in replace(s, seed=5).cells()) == 5
    paper = SCALES["paper"].cells()
    assert {c.architecture for c in paper} == {*ARCHITECTURES} - {"resnet18"} and {c.n_classes for c in paper if c.dataset == "mnist"} == {2, 3, 5, 10}
    assert {c.eps for c in paper} == {0, .1, .2, .3} and {(c.epochs, c.lr) for c in paper} == {(100, .01)}
    assert all(c.default == SAEConfig.quick() and c.released == SAEConfig.released() for c in paper) and all(c.default == SAEConfig.quick() for c in SCALES["laptop"].cells())


@pytest.mark.parametrize("bad, says", [(dict(eps=-.1), "eps must be a finite number >= 0, got -0.1"), (dict(eps=math.nan), "eps must"), (dict(width=0), "width must be positive"), (dict(epochs=0), "epochs"),
                                       (dict(architecture="vgg"), "architecture must be one of mlp1"), (dict(octaves=(1, 2)), "octaves must hold 0"), (dict(sae_seeds=0), "sae_seeds"), (dict(weighting="half"), "weighting must"), (dict(attack="autoattack"), "AutoAttack is for evaluation"), (dict(autoattack=-1), "autoattack")], ids=str)
def test_bad_cells(bad, says):
    with pytest.raises(ValueError, match=says):
        Cell(**bad)


@pytest.mark.parametrize("make, says", [(lambda: Grid(eps=(.1, .2)), "eps must hold 0"), (lambda: Grid(eps=(0., -.1)), "eps must be a finite"), (lambda: Grid(n_classes=(2, 2)), "n_classes must hold different"),
                                        (lambda: Grid(networks=()), "networks must hold"), (lambda: SweepConfig(n_seeds=0), "n_seeds"), (lambda: SweepConfig(fvu=0.), "fvu must lie"),
                                        (lambda: network("mlp1", 2.5, (1, 8, 8), 2), "whole number for mlp1"), (lambda: network("resnet18", -1, (1, 8, 8), 2), "positive number for resnet18")])
def test_bad_sweeps(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_attack_on_a_model_without_gradients_is_refused():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("mlp1", 4, (1, 8, 8), 2)
        def forward(self, x): return self.net(x).detach()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs gradients .* remove no_grad"):
        adversarial.attack(Deaf(), x, y, .1)


def test_data_that_is_missing_is_found_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "run_cells", lambda *a, **k: pytest.fail("computed"))
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    for name, says in [("mnist", "mnist.* is missing. Fix"), ("cifar10", r"cifar-10-binary.tar.gz is missing. Fix: download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz .* and put it there")]:
        with pytest.raises(FileNotFoundError, match=says):
            run(replace(CONFIG, grids=(replace(CONFIG.grids[0], datasets=(name,)),)), progress=False)


def test_cost_counts_all_steps(monkeypatch):
    monkeypatch.setattr(sweep, "_step_seconds", lambda t, steps: (1., 10.))
    t = sweep.cost(replace(CONFIG, n_seeds=2))
    assert t[["networks", "clean_step", "attacked_step"]].values.tolist() == [[8, 1, 10]]
    assert t.hours.sum() * 3600 == pytest.approx(2 * 2 * 6 * 6 * (1 + 10))  # seeds, classes, epochs, batches of 20 in 120
    monkeypatch.undo()
    t = sweep.cost(SweepConfig((replace(CONFIG.grids[0], datasets=("cifar10",), networks=(("mlp1", 8), ("cnn1", 2))),), n_seeds=1), steps=1)
    assert (t.attacked_step > t.clean_step).all() and len(t) == 2


# --- the reading

def weighted(table, steeper):
    "A table of planted networks over three seeds, with a second arm whose attacked slope is `steeper`."
    arms = [table.assign(seed=s, weighting=w, effective_features=[1 + s / 100 + e * (slope + s / 10) for e in table.eps], robust_accuracy=r)
            for w, slope, r in (("even", 1., .5), ("released", 1. + steeper, .7)) for s in (0, 1, 2)]
    return pd.concat(arms)


def test_weightings_are_compared(table):
    t = weighted(table, 2.)
    found = sweep.compare_weightings(t)
    assert len(found) == 2 * 3 and found.difference.tolist() == pytest.approx([2 / 1.01] * 6, rel=.03) and (found.p < .05).all()
    assert (found.robust_even == .5).all() and (found.robust_released == .7).all()
    assert sweep.compare_weightings(t[t.weighting == "even"]).empty and sweep.compare_weightings(weighted(table, 0.)).p.min() > .5


def test_verdicts_rest_on_one_way_of_training(table, tmp_path):
    "The second arm has a file of its own and changes nothing else."
    t = weighted(table, 2.)
    even = t[t.weighting == "even"].reset_index(drop=True)
    pd.testing.assert_frame_equal(sweep.standard(t).reset_index(drop=True), even)
    pd.testing.assert_frame_equal(sweep.standard(planted := even.drop(columns=["attack", "weighting"])), planted)
    said, alone = report(t, CONFIG, tmp_path / "both"), report(even, CONFIG, tmp_path / "one")
    assert said.startswith(alone) and (tmp_path / "both/weightings.csv").exists() and not (tmp_path / "one/weightings.csv").exists()
    assert sweep.comparison(t, CONFIG) == sweep.comparison(even, CONFIG)
    assert (tmp_path / "both/changes.csv").read_bytes() == (tmp_path / "one/changes.csv").read_bytes()


def test_the_reading_names_attacks_in_doubt(table):
    doubt = table.assign(attack_warning=["no gradient at 12% of the images" if e else "" for e in table.eps], autoattack_accuracy=.25)
    assert "attacks in doubt on 2 of 4 networks: no gradient at some of the images (2)" in reading(doubt) and " / 0.25 (chance" in reading(doubt)
    assert "attacks in doubt on 0 of 4 networks" in reading(table.assign(attack_warning="")) and "AutoAttack" not in reading(table)


def test_data_sets_are_compared(table):
    "Planted: slopes on one data set lie 2 below those on the other."
    t = pd.concat([table.assign(dataset=d, seed=s, effective_features=[(1 + s / 100) * (1 + (a + s / 10) * e) for e in table.eps]) for d, a in (("mnist", 1), ("fashion_mnist", -1)) for s in (0, 1, 2)])
    said = sweep._datasets(t).splitlines()
    assert len(said) == 1 + 9 and all(-2.1 < float(row.split()[2]) < -1.9 for row in said[1:]) and sweep._datasets(table) == ""


def test_changes_of_planted_ratios(table):
    t = table.assign(effective_features=[2. ** (e / .1) if i == "attacked" else 3. for e, i in zip(table.eps, table.inputs)])
    two = pd.concat([t, t.assign(seed=1, effective_features=t.effective_features * (1 + (t.eps > 0)))])
    found = changes(two)
    assert found[found.inputs == "attacked"].ratio.tolist() == pytest.approx([2 * 2**.5] * 6) and found[found.inputs == "clean"].ratio.tolist() == pytest.approx([2**.5] * 6)
    assert (found.n_seeds == 2).all() and (found.low < found.ratio).all() and changes(t).low.isna().all()
    assert changes(two, "scale").ratio.gt(0).all()


def test_report(table, tmp_path):
    "Readings, verdicts of all readings, figures of what there is; planted networks of two widths."
    t = pd.concat([table.assign(seed=s, width=w, effective_features=[f * (1 + s / 10) * w**e for f, e in zip(table.effective_features, table.eps)]) for s in (0, 1, 2) for w in (6, 12)])
    said = report(t, CONFIG, tmp_path)
    assert "24 networks, 3 seed(s)" in said and said.startswith(reading(t)) and all(f"{h}" in said for h in ("H1", "H2", "H3"))
    kinds = {f"figure-{k}-{r}.png" for k in ("7", "8", "regimes") for r in READINGS}
    assert {p.name for p in tmp_path.iterdir()} == kinds | {"figure-readings.png", "changes.csv"}
    (tmp_path / "small").mkdir()
    assert "No verdicts: " in report(table, CONFIG, tmp_path / "small") and {p.name for p in (tmp_path / "small").iterdir()} == {"figure-readings.png", "changes.csv"}
    left, right = plot_changes(t)
    assert len(left.get_yticklabels()) == 4 and "2 classes, mlp1 6" in left.get_yticklabels()[0].get_text()


def test_what_does_not_change_has_no_correlation(table):
    said = reading(table.assign(alive_units=8))
    assert "alive_units changes by 1.00 to 1.00; too little to ask what F has to do with it" in said and "nan" not in said


@pytest.mark.parametrize("limits, arrows", [((.999, 1.001), True), ((1e-9, 1e9), False)])
def test_an_interval_that_goes_on_has_an_arrow(table, limits, arrows, monkeypatch):
    t = pd.concat([table.assign(seed=s, effective_features=[f * (1 + s * e) for f, e in zip(table.effective_features, table.eps)]) for s in (0, 1, 2)])
    monkeypatch.setattr(sweep, "_limits", lambda t: limits)
    marks = {line.get_marker() for ax in plot_changes(t) for line in ax.get_lines()}
    assert marks & {"<", ">"} == ({"<", ">"} if arrows else set())


def test_the_command_keeps_cells_and_goes_on(monkeypatch, tmp_path, capsys):
    "A cell that fails ends with status 2 and its settings; run again, only that one is computed."
    true, seen = sweep.measure_cell, []
    monkeypatch.setitem(SCALES, "smoke", replace(CONFIG, grids=(replace(CONFIG.grids[0], n_classes=(2,), eps=(0., .1, .2)),)))
    def measure(cell, networks):
        seen.append(cell)
        if len(seen) == 2: raise RuntimeError("the disk is full")
        return true(cell, networks)
    measure.__module__, measure.__qualname__ = true.__module__, true.__qualname__
    monkeypatch.setattr(sweep, "measure_cell", measure)
    command = ["reproduce", "adversarial", "--scale", "smoke", "--jobs", "1", "--quiet", "--out", str(tmp_path)]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "1 of 3 cells failed (the other 2 are kept in" in err and "n_classes=2" in err and "eps=0.1" in err and "RuntimeError: the disk is full" in err
    assert not (tmp_path / "table.csv").exists() and len(list((tmp_path / "cells").glob("*.json"))) == 2
    assert main(command) == 0 and len(seen) == 4 and seen[3] == seen[1]
    assert "H1" in capsys.readouterr().out and {"table.csv", "run.json", "figure-readings.png"} <= {p.name for p in tmp_path.iterdir()}
    assert main(command) == 0 and len(seen) == 4 and "nothing is run again" in capsys.readouterr().out


def test_processes_and_a_cluster_that_loses_a_worker_give_the_same(table, tmp_path):
    "Two processes; two Dask workers, one killed after the first cell has ended."
    with parallel_config(n_jobs=2):
        pd.testing.assert_frame_equal(run(CONFIG, progress=False, store=tmp_path / "processes"), table, check_exact=True)
    distributed = pytest.importorskip("distributed", reason="dask is not installed, pip install superposition_lc[cluster]: sweeps on a Dask cluster are NOT tested")
    store, killed = tmp_path / "dask", []
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster, distributed.Client(cluster) as client:
        pids = list(client.run(os.getpid).values())
        def kill_one():
            while not (store.exists() and list(store.glob("[!.]*.json"))): time.sleep(.005)
            os.kill(pids[0], signal.SIGKILL)
            killed.append(len(list(store.glob("[!.]*.json"))))
        thread = threading.Thread(target=kill_one, daemon=True)
        thread.start()
        with parallel_config(backend="dask"):
            found = run(CONFIG, progress=False, store=store)
        thread.join(10)
    pd.testing.assert_frame_equal(found, table, check_exact=True)
    assert killed and killed[0] < 4 and len(list(store.glob("*.json"))) == 4


def joined(cell, sign, word="-"): return f"{word}{sign}{cell.n}"


def test_what_is_given_beside_the_cell_is_not_in_its_key(tmp_path):
    first = run_cells(joined, [Number(1), Number(2)], tmp_path, progress=False, given=dict(sign="+", word="a"))
    again = run_cells(joined, [Number(1), Number(2)], tmp_path, progress=False, given=dict(sign="?"))
    assert first.values == again.values == ["a+1", "a+2"] and (first.found, again.found) == (0, 2)
    assert run_cells(joined, [Number(1), Number(2)], n_jobs=2, progress=False, given=dict(sign="+", word="a")).values == first.values
