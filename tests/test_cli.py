"""The command line: demo and measure, what they write and print, and what they refuse."""
import dataclasses
import json
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from superposition_lc import cli
from superposition_lc.cells import FailedCells
from superposition_lc.cli import as_text, load_model, main, reading
from superposition_lc.data import load_dataset
from superposition_lc.experiments.adversarial import AdversarialConfig
from superposition_lc.measurement import Measurement, measure
from superposition_lc.report import compared, read_report
from superposition_lc.sae import SAEConfig

QUICK = SAEConfig(expansion=4, kind="relu", steps=50, max_rounds=2, warmup=10)
TINY = AdversarialConfig(n_train=200, n_test=100, widths=(12,), eps=(0., .1), attack_steps=2, epochs=2, sae_seeds=1, estimator=QUICK)
NETS = """
import torch
from torch import nn
a_number = 3
def fresh():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
class Fresh(nn.Sequential):
    def __init__(self): super().__init__(*fresh())
def none(): return None
def needs(argument): return fresh()
def fails(): raise RuntimeError("no such checkpoint")
def large(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 8))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "A working folder with a module of factories; quick settings; nothing stays behind."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "_SUBSETS", {"digits": TINY, "mnist": TINY})
    monkeypatch.setattr(cli, "measure", partial(measure, config=QUICK))
    (tmp_path / "some_nets.py").write_text(NETS)
    (tmp_path / "broken_nets.py").write_text("def f(: pass")
    yield tmp_path
    for name in ("some_nets", "broken_nets"): sys.modules.pop(name, None)


def run(capsys, *args):
    "Status, stdout and stderr of one command."
    status = main([*args, "--quiet"])
    return status, *capsys.readouterr()


def measured(capsys, *args, model="some_nets:fresh", layers="2"):
    return run(capsys, "measure", "--model", model, "--layers", layers, "--seeds", "1", *args)


def refused(result, *says):
    "Status 2, one message on stderr, nothing on stdout."
    status, out, err = result
    assert status == 2 and out == "" and err.startswith("superposition-lc: ") and "Traceback" not in err
    for text in says: assert text in err


# --- demo

def test_demo(folder, capsys):
    status, out, err = run(capsys, "demo", "--out", "a/b")
    assert status == 0 and err == ""
    assert sorted(p.name for p in (folder / "a" / "b").iterdir()) == ["run.json", "superposition.csv", "superposition.png"]
    assert (folder / "a" / "b" / "superposition.png").read_bytes().startswith(b"\x89PNG\r\n")
    table = pd.read_csv("a/b/superposition.csv", keep_default_na=False)
    assert len(table) == 4 and as_text(table) in out and reading(table) in out
    assert "Training 2 networks on digits, against attacks of radius 0, 0.1" in out and "superposition.png" in out and "Read on: " in out
    about = json.loads((folder / "a" / "b" / "run.json").read_text())
    assert about["config"]["seed"] == 0 and about["config"]["estimator"]["expansion"] == 4 and "torch" in about["versions"]


def test_demo_is_seeded(folder, capsys):
    outs = [run(capsys, "demo", "--out", out, "--seed", seed)[1] for out, seed in [("a", "5"), ("b", "5"), ("c", "6")]]
    tables = [(folder / out / "superposition.csv").read_text() for out in "abc"]
    assert tables[0] == tables[1] != tables[2]
    assert outs[0].split("Figure")[0] == outs[1].split("Figure")[0]
    assert json.loads((folder / "c" / "run.json").read_text())["config"]["seed"] == 6


def test_demo_where_nothing_can_be_written(capsys, monkeypatch):
    "It says so before the networks are trained."
    monkeypatch.setattr(cli, "run", lambda *args: pytest.fail("trained for nothing"))
    status, out, err = run(capsys, "demo", "--out", "some_nets.py/out")
    assert status == 2 and err.startswith("superposition-lc: ")


def test_demo_that_lacks_its_data(folder, capsys, monkeypatch):
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(folder))
    monkeypatch.setitem(cli._SUBSETS, "mnist", dataclasses.replace(TINY, data="mnist"))
    status, out, err = run(capsys, "demo", "--data", "mnist", "--out", "x")
    assert status == 2 and "is missing. Fix:" in err and not list(folder.glob("x/*"))


# --- the reading

def rows(clean, attacked):
    "A table of two radii: ends of the intervals at both, for clean and attacked images."
    return pd.DataFrame([dict(eps=e, inputs=kind, layer=layer, accuracy_common=.25 + e, effective_features=(lo + hi) / 2 + shift, low=lo + shift, high=hi + shift, warning="")
                         for layer, shift in [("relu1", 0), ("relu2", 500)]
                         for kind, spans in [("clean", clean), ("attacked", attacked)] for e, (lo, hi) in zip((.3, 0.), spans[::-1])])


@pytest.mark.parametrize("spans, says", [
    ([(10, 20), (21, 30)], "rises from 15.0 to 25.5"), ([(21, 30), (10, 20)], "falls from 25.5 to 15.0"),
    ([(10, 20), (19, 30)], "does not clearly change from 15.0 to 24.5"), ([(10, 20), (20, 30)], "does not clearly change from 15.0 to 25.0"),
    ([(10, 20), (10, 20)], "does not clearly change from 15.0 to 15.0")], ids=str)
def test_reading(spans, says):
    for clean, attacked, kind in [(spans, [(1, 2), (1, 2)], "clean"), ([(1, 2), (1, 2)], spans, "attacked")]:
        text = reading(rows(clean, attacked))
        assert f"{says} on {kind} images" in text and "1.5 to 1.5" in text
        assert "radius 0.3 instead of none" in text and "from 0.25 to 0.55" in text


def test_reading_names_flagged_rows_of_its_layer_only():
    table = rows([(10, 20), (21, 30)], [(1, 2), (1, 2)])
    flag = lambda layer, eps, kind: table.assign(warning=["dense code" if (r.layer, r.eps, r.inputs) == (layer, eps, kind) else "" for r in table.itertuples()])
    assert "flagged" not in reading(flag("relu2", .3, "clean"))
    said = reading(flag("relu1", .3, "clean")), reading(flag("relu1", 0., "attacked"))
    assert "25.5 on clean images (flagged, not to be relied on: dense code at radius 0.3)" in said[0] and said[0].count("flagged") == 1
    assert "1.5 on attacked images (flagged, not to be relied on: dense code at radius 0)" in said[1] and said[1].count("flagged") == 1


def test_text_leaves_out_what_is_not_there():
    table = pd.DataFrame([dict(layer="a", effective_features=12.345, l0=1.26, warning="", other=3)])
    assert as_text(table).split() == ["layer", "effective_features", "l0", "warning", "a", "12.3", "1.3"]


# --- measure

def test_measure(folder, capsys):
    status, out, err = measured(capsys, "--out", "new/m.json", layers="1,2")
    assert (status, err) == (0, "") and "Written: new/m.json, new/m.png" in out
    m = Measurement.load("new/m.json")
    assert m.table.layer.tolist() == ["1", "2"] and m.table.n_samples.tolist() == [450, 450] and as_text(m.table) in out
    assert (folder / "new" / "m.png").read_bytes().startswith(b"\x89PNG\r\n")
    sys.path.insert(0, "")
    expected = measure(load_model("some_nets:fresh"), load_dataset().x_test, ["1", "2"], QUICK, seeds=1, progress=False)
    assert m.table.equals(expected.table)


def test_measure_prints_only(folder, capsys):
    before = set(folder.rglob("*"))
    status, out, err = measured(capsys, "--samples", "100")
    assert status == 0 and "Written" not in out and {p for p in folder.rglob("*") if "__pycache__" not in p.parts} <= before
    assert measured(capsys, "--samples", "100")[1] == out != measured(capsys, "--samples", "100", "--seed", "3")[1]


def test_store_keeps_layers(folder, capsys, monkeypatch):
    "A second run trains nothing; another layer is trained, and without the folder all are."
    first = measured(capsys, "--samples", "100", "--store", "kept")
    assert first[0] == 0 and any((folder / "kept").iterdir())
    def refuse(*args, **kwargs): raise ValueError("trained again")
    monkeypatch.setattr("superposition_lc.measurement.train_sae", refuse)
    assert measured(capsys, "--samples", "100", "--store", "kept")[1] == first[1]
    for again in (measured(capsys, "--samples", "100", "--store", "kept", layers="1"), measured(capsys, "--samples", "100")):
        assert again[0] == 2 and "trained again" in again[2]


def weights(seed=9):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).state_dict()


@pytest.mark.parametrize("model", ["some_nets:fresh", "some_nets:Fresh"])
def test_weights_of_both_kinds(capsys, model):
    save_file(weights(), "w.safetensors")
    torch.save(weights(), "w.pt")
    torch.save(weights(), "old.bin", _use_new_zipfile_serialization=False)
    outs = [measured(capsys, *args, model=model) for args in [("--weights", "w.safetensors"), ("--weights", "w.pt"), ("--weights", "old.bin"), ()]]
    assert [o[0] for o in outs] == [0] * 4 and outs[0] == outs[1] == outs[2] != outs[3]
    sys.path.insert(0, "")
    assert all(torch.equal(v, weights()[k]) for k, v in load_model(model, "w.pt").state_dict().items())


class Payload:
    "Unpickled as code, it makes a file."
    def __reduce__(self): return eval, ("open('owned', 'w').close()",)


@pytest.mark.parametrize("kind", ["zip", "old", "inside", "pickle", "safetensors"])
def test_code_in_weights_is_not_run(folder, capsys, kind):
    import pickle
    path = "evil.safetensors" if kind == "safetensors" else "evil.pt"
    if kind in ("pickle", "safetensors"):
        with open(path, "wb") as f: pickle.dump(Payload(), f, protocol=2)
    else:
        torch.save(weights() | {"1.bias": Payload()} if kind == "inside" else Payload(), path, _use_new_zipfile_serialization=kind != "old")
    refused(measured(capsys, "--weights", path), path, "not a readable file of plain weights", "save_file(model.state_dict()")
    assert not (folder / "owned").exists()
    if kind == "zip":  # the payload works
        torch.load(path, weights_only=False)
        assert (folder / "owned").exists()


def test_whole_models_are_refused(capsys):
    torch.save(nn.Linear(64, 8), "net.pt")
    refused(measured(capsys, "--weights", "net.pt"), "plain weights")


def test_weights_that_do_not_fit(capsys):
    renamed = {"net." + k: v for k, v in weights().items()}
    resized = weights() | {"1.bias": torch.zeros(9)}
    for state, says in [(renamed, "1.weight"), (resized, "size mismatch"), ({}, "Missing key"), (weights() | {"extra": torch.ones(1)}, "extra")]:
        save_file(state, "w.safetensors")
        torch.save(state, "w.pt")
        for path in ("w.safetensors", "w.pt"):
            refused(measured(capsys, "--weights", path), f"--weights {path} do not fit the model", says)
    for state in (3, [1], torch.ones(3), {"1.weight": 3}):
        torch.save(state, "w.pt")
        refused(measured(capsys, "--weights", "w.pt"), "do not fit the model")


def test_damaged_weights(capsys):
    save_file(weights(), "w.safetensors")
    torch.save(weights(), "w.pt")
    for path in ("w.safetensors", "w.pt"):
        whole = open_bytes(path)
        for part in (b"", whole[:3], whole[:len(whole) // 2], whole[:-1], b"text"):
            with open(path, "wb") as f: f.write(part)
            refused(measured(capsys, "--weights", path), path)


def open_bytes(path):
    with open(path, "rb") as f: return f.read()


def test_damaged_weights_of_the_old_kind(capsys):
    torch.save(weights(), "old.pt", _use_new_zipfile_serialization=False)
    whole = open_bytes("old.pt")
    for cut in range(0, 900, 23):
        with open("old.pt", "wb") as f: f.write(whole[:cut])
        with pytest.raises(ValueError, match="old.pt is not a readable file"):
            cli._load_weights(nn.Linear(64, 8), "old.pt")


def test_missing_weights(capsys):
    refused(measured(capsys, "--weights", "nothing.pt"), "--weights nothing.pt: no such file")
    refused(measured(capsys, "--weights", "."), "no such file")


@pytest.mark.parametrize("model, says", [
    ("some_nets", "must look like module:factory, got 'some_nets'"), ("some_nets:", "must look like"), ("no_nets:fresh", "No module named 'no_nets'"),
    ("some_nets:frehs", "frehs"), ("some_nets:none", "returned a NoneType, not a torch.nn.Module"), ("torch.nn:Identity.x", "--model"),
    (":fresh", "--model"), (".some_nets:fresh", "--model"), ("some_nets:needs", "argument"), ("some_nets:a_number", "--model"),
    ("some_nets:fails", "no such checkpoint"), ("broken_nets:f", "broken_nets")])
def test_bad_model(capsys, model, says):
    refused(measured(capsys, model=model), says)


def test_bad_layers(capsys):
    refused(measured(capsys, layers="2,33"), "no layer '33'")
    sys.modules.pop("some_nets")
    with open("some_nets.py", "a") as f: f.write("\ndef named():\n net = nn.Sequential()\n net.hidden = nn.Linear(3, 2)\n return net\n")
    refused(measured(capsys, model="some_nets:named", layers="hiden"), "no layer 'hiden'; did you mean 'hidden'?")


def test_layers_with_spaces(capsys):
    assert measured(capsys, layers="1, 2")[0] == 0


def test_network_that_does_not_take_the_images(capsys):
    refused(measured(capsys, model="some_nets:large", layers="1"), "(256, 1, 8, 8)", "784x8", "Fix")


@pytest.mark.parametrize("args", [("--seeds", "0"), ("--seeds", "-2"), ("--samples", "0")])
def test_bad_numbers(capsys, args):
    refused(measured(capsys, *args))


@pytest.mark.parametrize("out", ["m.png", "m", "m.json"])
def test_figure_does_not_replace_the_measurement(capsys, out):
    "Either refused, or the measurement is there afterwards."
    if measured(capsys, "--out", out)[0] == 0:
        assert Measurement.load(out).table.layer.tolist() == ["2"]


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["measure"], ["measure", "--model", "a:b"], ["demo", "--data", "imagenet"], ["demo", "--seed", "x"]], ids=str)
def test_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as e:
        main(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.startswith("usage: superposition-lc")


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["measure", "--help"]], ids=str)
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 0 and "usage: superposition-lc" in capsys.readouterr().out


def test_entry_point():
    from importlib.metadata import entry_points
    found = [e for e in entry_points(group="console_scripts") if e.name == "superposition-lc"]
    assert [e.load() for e in found] == [main]


# --- reproduce

@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0
    size: tuple = (1, 2)


class Stand:
    "An experiment that counts how often it runs."
    SCALES = dict(smoke=Settings(), laptop=Settings(size=(9,)), paper=Settings())

    def __init__(self): self.runs = 0

    def run(self, config, progress):
        self.runs += 1
        return pd.DataFrame(dict(seed=config.seed, number=[1 / 3, float("nan")], word=["", "a"], flag=[True, False]))

    def report(self, table, config, out):
        (out / "figure.png").write_text("x")
        return f"seed {table.seed[0]}, {float(table.number[0])!r}, {table.word.tolist()}, {table.number.isna().tolist()}, {table.flag.tolist()}"


@pytest.fixture
def stand(monkeypatch):
    monkeypatch.setitem(cli.EXPERIMENTS, "toy_models", experiment := Stand())
    return experiment


@pytest.fixture
def two(monkeypatch):
    "Two stand-ins in place of all experiments: `good` has a number to compare, `bad` fails until `bad.broken` is None."
    class Good(Stand):
        "Is it good?"
        def comparison(self, table, config): return [compared("3a", "a number", 1 / 3, [1 / 3, 1 / 3])]

    class Bad(Stand):
        "Is it bad?"
        broken = FailedCells("3 of 4 cells failed", pd.DataFrame())

        def run(self, config, progress):
            if self.broken: raise self.broken
            return super().run(config, progress)

    experiments = dict(toy_models=Good(), parity=Bad())
    for name in list(cli.EXPERIMENTS): monkeypatch.delitem(cli.EXPERIMENTS, name)
    for name, e in experiments.items(): monkeypatch.setitem(cli.EXPERIMENTS, name, e)
    return experiments


def reproduced(capsys, *args): return run(capsys, "reproduce", "toy_models", *args)


def test_every_experiment_has_the_three_parts():
    for module in cli.EXPERIMENTS.values():
        assert list(module.SCALES) == ["smoke", "laptop", "paper"] and callable(module.run) and callable(module.report)
        for config in module.SCALES.values():
            assert json.loads(json.dumps(dataclasses.asdict(config))) and dataclasses.replace(config, seed=3).seed == 3


def test_reproduce_writes_and_resumes(folder, capsys, stand):
    status, out, err = reproduced(capsys, "--scale", "smoke", "--out", "a/b")
    assert (status, err, stand.runs) == (0, "", 1)
    assert "seed 0, 0.333333333333333" in out and "['', 'a'], [False, True], [True, False]" in out and "Found the finished" not in out
    assert sorted(p.name for p in (folder / "a" / "b").iterdir()) == ["figure.png", "run.json", "table.csv"]
    about = json.loads((folder / "a" / "b" / "run.json").read_text())
    assert about["config"] == {"seed": 0, "size": [1, 2]} and "torch" in about["versions"]
    (folder / "a" / "b" / "figure.png").unlink()
    again = reproduced(capsys, "--scale", "smoke", "--out", "a/b")
    assert stand.runs == 1 and again[1].startswith("Found the finished table")
    assert again[1].split("\n", 1)[1] == out and (folder / "a" / "b" / "figure.png").exists()


def test_reproduce_has_a_default_folder(folder, capsys, stand):
    assert reproduced(capsys)[0] == 0 and (folder / "toy_models-laptop" / "table.csv").exists()


@pytest.mark.parametrize("harm", ["seed", "scale", "cut table", "edited table", "no table", "cut json", "text json", "no json", "version"])
def test_reproduce_runs_again_what_is_not_the_same_or_not_whole(folder, capsys, stand, harm):
    args = ["--scale", "smoke", "--out", "x"]
    first = reproduced(capsys, *args)[1]
    table, about = folder / "x" / "table.csv", folder / "x" / "run.json"
    if harm == "cut table": table.write_text(table.read_text()[:-5])
    elif harm == "edited table": table.write_text(table.read_text().replace("a", "b"))
    elif harm == "no table": table.unlink()
    elif harm == "cut json": about.write_text(about.read_text()[:40])
    elif harm == "text json": about.write_text("3")
    elif harm == "no json": about.unlink()
    elif harm == "version": about.write_text(json.dumps(json.loads(about.read_text()) | {"versions": {"superposition_lc": "0.0.0"}}))
    elif harm == "seed": args += ["--seed", "4"]
    elif harm == "scale": args[1] = "laptop"
    status, out, err = reproduced(capsys, *args)
    assert (status, err, stand.runs) == (0, "", 2) and "Found" not in out
    assert out == first or harm == "seed" and "seed 4" in out
    assert reproduced(capsys, *args)[0] == 0 and stand.runs == 2


def test_reproduce_that_fails_leaves_nothing_finished(folder, capsys, stand, monkeypatch):
    "The report may fail without costing the run; a failed run leaves no table."
    monkeypatch.setattr(stand, "report", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): reproduced(capsys, "--out", "x")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setitem(cli.EXPERIMENTS, "toy_models", stand)
    assert reproduced(capsys, "--out", "x")[1].startswith("Found the finished table") and stand.runs == 1
    monkeypatch.setattr(stand, "run", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): reproduced(capsys, "--out", "y")
    assert not list((folder / "y").iterdir())


def test_reproduce_where_nothing_can_be_written(capsys, stand):
    status, out, err = reproduced(capsys, "--out", "some_nets.py/out")
    assert status == 2 and stand.runs == 0 and err.startswith("superposition-lc: ")


@pytest.mark.parametrize("argv", [["reproduce"], ["reproduce", "toys"], ["reproduce", "toy_models", "--scale", "huge"], ["reproduce", "toy_models", "--seed", "x"]], ids=str)
def test_reproduce_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and "usage: superposition-lc reproduce" in capsys.readouterr().err


# --- reproduce all

def all_of_it(capsys, *args): return run(capsys, "reproduce", "all", "--out", "r", *args)


def test_all_reports_a_failure_and_goes_on(folder, capsys, two):
    status, out, err = all_of_it(capsys)
    assert status == 1 and "parity failed, FailedCells: 3 of 4 cells failed" in err and "Failed: parity" in out
    done, broken = read_report("r")["experiments"]
    assert (done["status"], broken["status"], done["numbers"][0]["verdict"]) == ("finished", "failed", "agrees")
    assert done["config"] == {"seed": 0, "size": [9]} and done["other_settings"] == {"size": [[9], [1, 2]]} and done["seconds"] >= 0
    assert [p["file"] for p in done["pictures"]] == ["toy_models/figure.png"] and (folder / "r" / "report.html").exists()
    two["parity"].broken = None
    status, out, err = all_of_it(capsys)
    assert (status, err, two["toy_models"].runs, two["parity"].runs) == (0, "", 1, 1) and [e["status"] for e in read_report("r")["experiments"]] == ["finished"] * 2


def test_all_of_one_keeps_the_others(capsys, two):
    two["parity"].broken = None
    assert all_of_it(capsys, "--only", "parity")[0] == 0
    assert [e["status"] for e in read_report("r")["experiments"]] == ["not run", "finished"]
    assert all_of_it(capsys, "--only", " toy_models")[0] == 0 and [e["status"] for e in read_report("r")["experiments"]] == ["finished"] * 2
    all_of_it(capsys, "--only", "parity", "--seed", "1")
    assert [e["status"] for e in read_report("r")["experiments"]] == ["not run", "finished"]  # never two seeds in one report
    all_of_it(capsys, "--only", "parity", "--scale", "smoke")
    assert [e["status"] for e in read_report("r")["experiments"]] == ["not run", "finished"]


def test_all_of_it_stopped_in_the_middle(folder, capsys, two):
    "What was finished is in the report, and is not run again."
    two["parity"].broken = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt): all_of_it(capsys)
    assert [e["status"] for e in read_report("r")["experiments"]] == ["finished", "not run"]
    two["parity"].broken = None
    assert all_of_it(capsys)[0] == 0 and two["toy_models"].runs == 1


def test_all_with_a_report_that_cannot_be_read(folder, capsys, two):
    (folder / "r").mkdir()
    (folder / "r" / "report.json").write_text("{")
    two["parity"].broken = None
    assert all_of_it(capsys)[0] == 0 and read_report("r")["scale"] == "laptop"


def test_the_list(folder, capsys, two):
    status, out, err = run(capsys, "reproduce", "--list")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == ["toy_models", "parity"] and "Figures 2b, 3a, 3b" in out and "Is it bad?" in out
    assert "finished" not in out and not list(folder.glob("all*"))
    all_of_it(capsys)
    out = run(capsys, "reproduce", "all", "--list", "--out", "r")[1].splitlines()
    assert "(finished in r" in out[0] and "finished" not in out[1] and "finished" not in run(capsys, "reproduce", "--list", "--out", "r", "--seed", "1")[1]


def test_all_refuses(capsys, two):
    refused(all_of_it(capsys, "--only", "parity,toys"), "'toys'", "there are toy_models, parity")
    refused(all_of_it(capsys, "--only", ""), "no experiment is called ''")
    for argv in (["reproduce", "parity", "--only", "parity"], ["reproduce", "--only", "parity"]):
        with pytest.raises(SystemExit) as e: main(argv)
        assert e.value.code == 2 and "usage: superposition-lc reproduce" in capsys.readouterr().err


def test_two_experiments_for_real(folder, capsys, monkeypatch):
    "Far below the smoke scale, from the command to the page; a second call runs nothing."
    toy, grokking = cli.EXPERIMENTS["toy_models"], cli.EXPERIMENTS["grokking"]
    smoke = toy.SCALES["smoke"]
    monkeypatch.setitem(toy.SCALES, "smoke", dataclasses.replace(smoke, n_models=4, steps=20, n_samples=100, n_seeds=1, estimators=smoke.estimators[1:2], sweep_models=0))
    monkeypatch.setitem(grokking.SCALES, "smoke", dataclasses.replace(grokking.SCALES["smoke"], steps=20, checkpoints=2, llc_draws=3, n_seeds=1, estimators=grokking.SCALES["smoke"].estimators[:1]))
    args = "--scale", "smoke", "--only", "toy_models,grokking"
    status, first, err = all_of_it(capsys, *args)
    report = read_report("r")
    assert (status, err) == (0, "") and [e["status"] for e in report["experiments"] if e["name"] in args[3]] == ["finished"] * 2
    assert "psi(Z), estimator released: r = " in first and (folder / "r" / "toy_models" / "figure-2b.png").exists()
    assert {v["verdict"] for e in report["experiments"] for v in e["numbers"]} <= {"cannot tell"}
    for e in report["experiments"]:
        for p in e["pictures"]: assert (folder / "r" / p["file"]).is_file()
    status, again, err = all_of_it(capsys, *args)
    assert again.count("nothing is run again") == 2 and read_report("r")["experiments"] == report["experiments"]
