"""What goes wrong outside: kills, full disks, damaged and hostile files, folders that cannot be written, two runs at once, training that diverges."""
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from superposition_lc import (Measurement, RateDistortion, SAEConfig, ShareAccumulator, SparseAutoencoder, effective_features, export_sae, feature_shares, hill_number, load_dataset,
                              load_sae, measure, measure_activations, merge_split_features, planted_activations, rate_distortion, recurring_features)
from superposition_lc import cli
from superposition_lc.cells import FailedCells, run_cells
from superposition_lc.data import read_idx
from superposition_lc.experiments import adversarial, algorithmic, grokking, parity, toy_models
from superposition_lc.experiments.adversarial import AdversarialConfig
from superposition_lc.report import read_report, without_result, write_report

QUICK = SAEConfig(kind="relu", expansion=2, steps=20, max_rounds=1, warmup=5)
TINY = AdversarialConfig(n_train=100, n_test=50, widths=(8,), eps=(0., .1), attack_steps=1, epochs=1, sae_seeds=1, estimator=QUICK)
quickly = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- kill -9, and two runs at once

DRIVER = """
    import os, random, signal, sys, time
    import pandas as pd, torch
    torch.set_num_threads(1)
    from dataclasses import dataclass
    from pathlib import Path
    from superposition_lc import cli
    from superposition_lc.report import compared, read_report
    from superposition_lc.runs import atomic_path
    from test_faults import TINY, whole

    @dataclass(frozen=True)
    class Config: seed: int = 0

    class Slow:
        "Stands for an experiment: some work, a table, a large picture."
        SCALES = dict(smoke=Config(), laptop=Config(), paper=Config())
        def run(self, config, progress):
            with open("started", "a") as f: f.write("x")
            for _ in range(10): time.sleep(.004)
            return pd.DataFrame(dict(n=range(300), value=[i**.5 for i in range(300)]))
        def report(self, table, config, out):
            with atomic_path(out/"figure-3a.png") as p: p.write_bytes(bytes(3_000_000))
            return "done"
        def comparison(self, table, config): return [compared("3a", "x", 1., [1., 1.])]

    cli.EXPERIMENTS.clear()
    cli.EXPERIMENTS.update(a=Slow(), b=Slow(), c=Slow())
    ALL = ["reproduce", "all", "--scale", "smoke", "--quiet", "--jobs", "1"]

    def start(work):
        if pid := os.fork(): return pid
        status = 3
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = work() or 0
        finally: os._exit(status)

    def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    def finished(out): return {e["name"] for e in read_report(out)["experiments"] if e["status"] == "finished"} if (Path(out)/"report.json").exists() else set()

    rng, kills = random.Random(0), 10
    for _ in range(kills):
        before = finished("killed")
        pid = start(lambda: cli.main([*ALL, "--out", "killed"]))
        time.sleep(rng.uniform(0, .25))
        os.kill(pid, signal.SIGKILL)
        end(pid)
        assert before <= finished("killed"), "a finished experiment was lost"
    assert end(start(lambda: cli.main([*ALL, "--out", "killed"]))) == 0 and finished("killed") == {"a", "b", "c"}
    pictures = [p["file"] for e in read_report("killed")["experiments"] for p in e["pictures"]]
    assert pictures == [f"{n}/figure-3a.png" for n in "abc"], pictures
    print(Path("started").stat().st_size, "runs of 3")
    assert 3 <= Path("started").stat().st_size <= 3 + kills

    pids = [start(lambda: cli.main([*ALL, "--out", "shared"])) for _ in range(3)]
    assert [end(p) for p in pids] == [0, 0, 0] and finished("shared") == {"a", "b", "c"}, "runs in one folder disturb each other"
    before = Path("started").stat().st_size
    assert end(start(lambda: cli.main([*ALL, "--out", "shared"]))) == 0 and Path("started").stat().st_size == before

    def again_and_again():
        while True: cli.demo(TINY, "demo", progress=False)
    for _ in range(4):
        pid = start(again_and_again)
        time.sleep(rng.uniform(.2, 1.2))
        os.kill(pid, signal.SIGKILL)
        assert end(pid) == -signal.SIGKILL
        for p in Path("demo").glob("[!.]*"): whole(p)
"""


def whole(path):
    "Fail for a file that was cut short."
    content = path.read_bytes()
    if path.suffix == ".png": assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82"), path
    elif path.suffix == ".json": json.loads(content)
    else: assert len(pd.read_csv(BytesIO(content))) == 4 and content.endswith(b"\n"), path


def test_killed_at_random_moments_and_run_twice_at_once(tmp_path):
    "`reproduce all` loses nothing that was finished; three runs in one folder all end well; whatever a killed demo leaves is whole."
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    place = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-W", "ignore", "driver.py"], cwd=tmp_path, env=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# --- a full disk

@contextmanager
def full_disk(limit=100):
    "No file may grow beyond `limit` bytes: writes fail as they do where the disk is full."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Unit: n: int = 0


def long_result(cell): return ["x" * 500] * cell.n


@pytest.fixture(scope="module")
def results():
    "One of everything that can be written."
    x = planted_activations(12, 8, 400).activations
    m, r = measure_activations(x, QUICK, 1, progress=False), rate_distortion(x, [.3, .6], config=QUICK, seeds=1, progress=False)
    sae = SparseAutoencoder(8, 16)
    return {"m.json": m.save, "r.json": r.save, "sae.safetensors": sae.save, "exported": lambda p: export_sae(sae, p),
            "report": lambda p: write_report("laptop", "1", [without_result("a", "b" * 200)], p), "store": lambda p: run_cells(long_result, [Unit(0), Unit(3)], p, n_jobs=1, progress=False)}


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["m.json", "r.json", "sae.safetensors", "exported", "report", "store"])
def test_a_full_disk_costs_nothing_that_was_there(name, results, tmp_path):
    "An error that says so, the old file as it was, no half of the new one; and with room again it is written."
    write, path = results[name], tmp_path / name
    with full_disk(), pytest.raises(Exception) as e: write(path)
    assert any(word in str(e.value).lower() for word in ("file too large", "no space")), e.value
    assert not [p for p in contents(tmp_path) if not p.startswith("store/")], "half a file is left"
    write(path)
    before = contents(tmp_path)
    assert before
    if name != "store":  # finished cells are not written again
        with full_disk(), pytest.raises(Exception): write(path)
    assert contents(tmp_path) == before


@dataclass(frozen=True)
class Config: seed: int = 0


class Experiment:
    "A stand-in whose table is larger than the disk."
    SCALES = dict(smoke=Config(), laptop=Config(), paper=Config())
    def run(config, progress): return pd.DataFrame(dict(n=range(100)))
    def report(table, config, out): return "done"


def test_commands_say_that_the_disk_is_full(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_SUBSETS", {"digits": TINY})
    monkeypatch.setitem(cli.EXPERIMENTS, "parity", Experiment)
    for argv in (["demo", "--quiet", "--out", "d"], ["reproduce", "parity", "--quiet", "--out", "r"]):
        with full_disk(): status = cli.main(argv)
        err = capsys.readouterr().err
        assert status == 2 and err.startswith("superposition-lc: ") and "too large" in err and err.count("\n") == 1, err
    assert not contents(tmp_path)


# --- folders that cannot be written

def test_a_cache_that_cannot_be_written_says_how_to_do_without(tmp_path, monkeypatch):
    "Simulated: the cache would lie inside a file."
    import pooch
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("SUPERPOSITION_LC_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "file" / name)
    for name in ("mnist", "cifar10"):
        with pytest.raises(OSError, match="SUPERPOSITION_LC_DATA=FOLDER"): load_dataset(name, progress=False)


@pytest.mark.parametrize("write", ["m.json", "r.json", "sae.safetensors", "report"])
def test_a_folder_that_cannot_be_made_is_named(write, results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"): results[write](tmp_path / "file" / write)


# --- damaged and hostile files

class Payload:
    "Unpickled, it makes a file."
    def __reduce__(self): return eval, ("open('owned', 'w').close()",)


def test_code_in_npz_and_idx_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("evil.npz", task=np.array([Payload()], dtype=object))
    with pytest.raises(ValueError, match="not a readable npz"): algorithmic.read_compiled("evil.npz")
    assert not Path("owned").exists()
    np.load("evil.npz", allow_pickle=True)["task"]  # the payload works
    assert Path("owned").exists()


@pytest.fixture(scope="module")
def files(results, tmp_path_factory):
    "A whole file of every kind that is read, as bytes, and its reader."
    folder, sae = tmp_path_factory.mktemp("files"), SparseAutoencoder(8, 16)
    for name in ("m.json", "r.json"): results[name](folder / name)
    for format in ("saelens", "dictionary_learning"): export_sae(sae, folder / format, format)
    write_report("laptop", "1", [without_result("a", "b")], folder)
    torch.save(sae.state_dict(), folder / "state.pt")
    kinds = {"m.json": Measurement.load, "r.json": RateDistortion.load, "report.json": lambda p: read_report(p.parent), "state.pt": lambda p: cli._load_weights(SparseAutoencoder(8, 16), p),
             "saelens/sae_weights.safetensors": lambda p: load_sae(p.parent), "saelens/cfg.json": lambda p: load_sae(p.parent),
             "dictionary_learning/ae.pt": lambda p: load_sae(p.parent), "dictionary_learning/config.json": lambda p: load_sae(p.parent)}
    program = Path(algorithmic.__file__).parent / "tracr-weights" / "sort.npz"
    (folder / "sort.npz").write_bytes(program.read_bytes())
    return folder, kinds | {"sort.npz": algorithmic.read_compiled}


READERS = ["m.json", "r.json", "report.json", "state.pt", "saelens/sae_weights.safetensors", "saelens/cfg.json", "dictionary_learning/ae.pt", "dictionary_learning/config.json", "sort.npz"]
damages = st.one_of(st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")), st.tuples(st.just("over"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
                    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)), st.tuples(st.just("all"), st.just(0.), st.binary(max_size=60)))


def damaged(content, damage):
    how, where, what = damage
    at = int(where * len(content))
    return {"cut": content[:at], "over": content[:at] + what + content[at + len(what):], "insert": content[:at] + what + content[at:], "all": what}[how]


@pytest.mark.parametrize("name", READERS)
@quickly
@given(damage=damages)
def test_a_damaged_file_is_refused_by_name_or_read_as_whole(name, files, damage):
    "Never another error than ValueError; json that still parses may hold another number."
    folder, kinds = files
    path = folder / name
    content = path.read_bytes()
    try:
        path.write_bytes(damaged(content, damage))
        kinds[name](path)
    except ValueError as e: assert str(e), "an error without words"
    finally: path.write_bytes(content)


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=4)


@pytest.mark.parametrize("name", [n for n in READERS if n.endswith(".json")])
@quickly
@given(data=st.data())
def test_json_with_other_values_is_refused_or_read(name, files, data):
    "One value anywhere in the file is another one, or gone."
    folder, kinds = files
    path = folder / name
    content = path.read_bytes()
    loaded = json.loads(content)
    place = loaded
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()): place = place[key]
        else: break
    if data.draw(st.booleans()): del place[key]
    else: place[key] = data.draw(json_values)
    try:
        path.write_text(json.dumps(loaded))
        kinds[name](path)
    except ValueError as e: assert str(e)
    finally: path.write_bytes(content)


# --- training that diverges

ABSURD = 1e30


@pytest.mark.parametrize("run", [
    lambda: adversarial.run(replace(TINY, lr=ABSURD), False),
    lambda: grokking.run(replace(grokking.SCALES["smoke"], lr=ABSURD, steps=4, checkpoints=2, n_seeds=1, llc_draws=2), False),
    lambda: toy_models.run(replace(toy_models.SCALES["smoke"], n_models=3, steps=5, n_samples=50, n_seeds=1, sweep_models=0, importance=1e38), False),
    lambda: parity.run(replace(parity.SCALES["smoke"], lr=ABSURD, epochs=1, scaling_seeds=1, widths=()), False)], ids=["adversarial", "grokking", "toy models", "parity"])
def test_a_network_that_diverges_is_refused_where_it_is_measured(run):
    "No table is made of NaN; the message says what was found."
    with pytest.raises((ValueError, FailedCells), match="NaN or infinite"): run()


def test_a_network_that_diverges_costs_no_other_experiment(tmp_path, monkeypatch, capsys):
    for name in list(cli.EXPERIMENTS): monkeypatch.delitem(cli.EXPERIMENTS, name)
    class Diverges(Experiment):
        def run(config, progress): return parity.run(replace(parity.SCALES["smoke"], lr=ABSURD, epochs=1, scaling_seeds=1, widths=()), False)
    for name, e in dict(first=Experiment, second=Diverges, third=Experiment).items(): monkeypatch.setitem(cli.EXPERIMENTS, name, e)
    assert cli.main(["reproduce", "all", "--quiet", "--out", str(tmp_path / "r")]) == 1
    assert [e["status"] for e in read_report(tmp_path / "r")["experiments"]] == ["finished", "failed", "finished"] and "NaN or infinite" in capsys.readouterr().out


def test_nan_in_the_middle_of_a_stream_is_named(monkeypatch):
    "A network that breaks at the third batch: nothing is measured on the first two."
    calls = []
    class Breaks(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x) * (float("nan") if len(calls) == 3 else 1)
    with pytest.raises(ValueError, match="layer '0'.*NaN or infinite"): measure(nn.Sequential(Breaks(4, 3)), [torch.randn(10, 4)] * 5, ["0"], QUICK, progress=False)
    assert len(calls) == 3


# --- public functions, given anything

def tensors(*dims, low=-1e3):
    "Small tensors of some number of axes, NaN, infinity, empty ones and other types among them."
    value = st.floats(low, 1e3) | st.sampled_from([0., float("nan"), float("inf"), -float("inf"), 1e-320, 1e38])
    def make(shape, values, dtype): return torch.tensor((values * (int(np.prod(shape)) // len(values) + 1))[:int(np.prod(shape))], dtype=torch.float64).reshape(shape).to(dtype)
    shapes = st.sampled_from(dims).flatmap(lambda n: st.tuples(*[st.integers(0, 5)] * n))
    return st.builds(make, shapes, st.lists(value, min_size=1, max_size=12), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool]))


def in_range(value, low, high): assert low - 1e-9 <= value <= high * (1 + 1e-9), value


@quickly
@given(tensors(1, 2, 3), st.floats(0, 8) | st.sampled_from([-1., float("inf"), float("nan")]))
def test_shares_and_counts(codes, order):
    try: p = feature_shares(codes)
    except (ValueError, TypeError) as e:
        assert str(e)
        return
    assert p.dtype == torch.float64 and abs(p.sum().item() - 1) < 1e-9 and (p >= 0).all()
    in_range(effective_features(p), 1, codes.shape[-1])
    try: in_range(hill_number(p, order), 1, codes.shape[-1])
    except ValueError as e: assert "order" in str(e) and not order >= 0


@quickly
@given(st.lists(tensors(2, 3), min_size=1, max_size=4), st.integers(-1, 60))
def test_streamed_shares(parts, n_groups):
    try:
        acc = ShareAccumulator(parts[0].shape[-1], n_groups)
        for part in parts: acc.update(part)
        e = acc.estimate()
    except (ValueError, TypeError) as e:
        assert str(e)
        return
    in_range(e.plug_in, 1, acc.shares.numel())
    assert not e.low > e.high


@quickly
@given(tensors(2), tensors(2), st.floats(-1, 2))
def test_features_in_common(a, b, threshold):
    for f in (lambda: merge_split_features(a), lambda: recurring_features(a, b, threshold=threshold)):
        try: f()
        except (ValueError, TypeError) as e: assert str(e)


@quickly
@given(st.integers(-1, 9), st.integers(-1, 9), st.integers(-1, 9), st.floats(-.5, 1.5), st.floats(-3, 3), st.floats(-1, 1), st.sampled_from(["random", "orthogonal", "correlated", "x"]))
def test_planted(k, n, s, activity, power, noise, directions):
    try: p = planted_activations(k, n, s, activity=activity, power=power, noise=noise, directions=directions)
    except ValueError as e:
        assert str(e)
        return
    assert p.activations.shape == (s, n) and p.activations.isfinite().all()


@quickly
@given(tensors(0, 1, 2, 3), st.sampled_from([0, 1, [0, 0], [], "x"]))
def test_measuring_anything(x, seeds):
    "A table in which everything is in range, or the reason why there is none."
    try: t = measure_activations(x, QUICK, seeds, progress=False).table.iloc[0]
    except (ValueError, TypeError) as e:
        assert str(e)
        return
    assert t.warning or (0 <= t.effective_features <= t.n_features and t.l0 >= 0)


@quickly
@given(st.binary(max_size=40), st.booleans())
def test_idx_of_anything(content, zipped):
    import gzip
    import tempfile
    with tempfile.NamedTemporaryFile() as f:
        f.write(gzip.compress(content) if zipped else content)
        f.flush()
        try: assert isinstance(read_idx(f.name), torch.Tensor)
        except ValueError as e: assert f.name in str(e)
