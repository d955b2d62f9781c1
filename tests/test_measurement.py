"""Network and data in, table with intervals out: columns, seeds, clusters, warnings, files, figures, bad input."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from torch import nn

from superposition_lc import measurement as module, runs
from superposition_lc.activations import Activations, capture
from superposition_lc.cells import FailedCells
from superposition_lc.data import planted_activations
from superposition_lc.entropy import ShareAccumulator, combine_seeds
from superposition_lc.measurement import Measurement, measure, measure_activations, row_warning
from superposition_lc.plotting import COLOURS
from superposition_lc.sae import SAEConfig, train_sae

QUICK = SAEConfig(expansion=4, kind="relu", steps=100, max_rounds=2, warmup=20, batch_size=64)
X = planted_activations(16, 8, 600).activations
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = dict(layer="O", n_neurons="i", n_features="i", n_samples="i", effective_features="f", low="f", high="f", superposition="f",
               l0="f", fvu="f", dead_fraction="f", converged="b", warning="O")


def measured(x=X, config=QUICK, seeds=2, **kwargs):
    return measure_activations(x, config, seeds, progress=False, **kwargs)


@pytest.fixture(scope="module")
def two():
    "Two layers of different shape, of which the second has a code that is far too dense."
    return measured({"fc": X, "dense": torch.randn(500, 6, generator=torch.Generator().manual_seed(0))})


def kinds(table):
    return {c: "O" if d.kind not in "ifb" else d.kind for c, d in table.dtypes.items()}


# --- the table

def test_columns(two):
    assert kinds(two.table) == COLUMNS and list(two.table) == list(COLUMNS)
    assert kinds(two.per_seed) == COLUMNS | dict(seed="i", stderr="f", df="f", shift="f") and len(two.per_seed) == 4
    assert two.table.layer.tolist() == ["fc", "dense"] and two.per_seed.seed.tolist() == [0, 1, 0, 1]
    assert two.table[["n_neurons", "n_features", "n_samples"]].values.tolist() == [[8, 32, 600], [6, 24, 500]]
    for t in (two.table, two.per_seed):
        assert (t.superposition == t.effective_features / t.n_neurons).all()
        assert (t.low < t.effective_features).all() and (t.effective_features < t.high).all()
    assert "dense code" in two.table.warning[1] and "dense code" not in two.table.warning[0]


def test_rows_are_those_of_the_trained_stack(two):
    t = train_sae(X, QUICK, 2, progress=False)
    rows = two.per_seed[two.per_seed.layer == "fc"]
    for name in ("l0", "fvu", "dead_fraction"):
        assert rows[name].tolist() == pytest.approx(t.table[name].tolist(), rel=1e-4)
        assert two.table[name][0] == pytest.approx(rows[name].mean())
    for seed, row in zip(range(2), rows.itertuples()):
        e = ShareAccumulator(32).update(t.sae[seed].encode(X).detach(), torch.arange(600)).estimate()
        assert (row.effective_features, row.low, row.high, row.stderr, row.df) == pytest.approx((e.value, e.low, e.high, e.stderr, e.df), rel=1e-3)
    expected = combine_seeds(rows.effective_features.tolist(), rows.stderr.tolist(), rows.df.tolist(), shift=rows["shift"].tolist())
    assert tuple(two.table.loc[0, ["effective_features", "low", "high"]]) == pytest.approx(expected)


def test_same_seeds_same_table(two):
    again = measured({"fc": X, "dense": torch.randn(500, 6, generator=torch.Generator().manual_seed(0))})
    assert again.table.equals(two.table) and again.per_seed.equals(two.per_seed)
    other = measured(seeds=[7, 1])
    assert other.per_seed.seed.tolist() == [7, 1] and other.settings["seeds"] == [1, 7]
    assert other.table.effective_features[0] != two.table.effective_features[0]


def test_layers_of_one_shape_are_trained_together_and_keep_their_order(monkeypatch):
    calls, true = [], train_sae
    monkeypatch.setattr(module, "train_sae", lambda x, *a: (calls.append(tuple(x.shape)), true(x, *a))[1])
    layers = {"a": X[:300], "b": X[:300, :5], "c": X[300:]}
    m = measured(layers, seeds=1)
    assert calls == [(2, 300, 8), (1, 300, 5)] and m.table.layer.tolist() == ["a", "b", "c"]
    monkeypatch.undo()
    for name, x in layers.items():
        alone = measured(x, seeds=1).table.iloc[0]
        together = m.table.set_index("layer").loc[name]
        assert alone.effective_features == pytest.approx(together.effective_features, rel=1e-3) and alone.fvu == pytest.approx(together.fvu, rel=1e-2)


def test_level():
    narrow, wide = measured(level=.5), measured(level=.99)
    assert narrow.settings["level"] == .5
    for a, b in [(narrow.table, wide.table), (narrow.per_seed, wide.per_seed)]:
        assert (b.low < a.low).all() and (a.high < b.high).all() and (a.effective_features == b.effective_features).all()


def test_clusters_reach_the_interval():
    "Ten samples an image that fire the same features tell less than ten images do."
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(200).repeat_interleave(10)
    fires = (torch.rand(200, 24, generator=g) < .1)[ids]
    x = fires * torch.rand(2000, 24, generator=g) @ nn.functional.normalize(torch.randn(24, 12, generator=g), dim=1)
    own, shuffled, none = (measured(a).per_seed for a in (Activations(x, ids), Activations(x, ids[torch.randperm(2000, generator=g)]), x))
    assert (own.stderr > 1.7 * shuffled.stderr).all() and (own.stderr > 1.7 * none.stderr).all()
    assert ((own.high - own.low) > 1.7 * (shuffled.high - shuffled.low)).all()
    assert own.effective_features.tolist() == pytest.approx(shuffled.effective_features.tolist(), rel=.03)


# --- warnings

GOOD = dict(layer="a", seed=0, n_neurons=10, n_features=80, n_samples=99, effective_features=20., low=19., high=21., stderr=.5, df=24., shift=0., superposition=2.,
            l0=3., fvu=.1, dead_fraction=.1, converged=True, warning="")


@pytest.mark.parametrize("change, says", [
    (dict(), ""), (dict(converged=False), "not converged"), (dict(l0=4.1), "dense code"), (dict(fvu=.51), "poor reconstruction"),
    (dict(effective_features=64.1), "dictionary full"), (dict(effective_features=0.), "nothing fires"), (dict(effective_features=math.nan), "diverged"),
    (dict(converged=False, l0=9., fvu=.9, effective_features=79.), "not converged; dense code; poor reconstruction; dictionary full")], ids=str)
def test_warnings(change, says):
    assert row_warning(GOOD | change) == says


def test_dense_codes_are_flagged():
    "Gaussian activations have no sparse code; a penalty that is too small asks for none, and with a search the reading is right or flagged."
    gauss = torch.randn(1500, 16, generator=torch.Generator().manual_seed(0))
    sparse, config = planted_activations(16, 16, 1500).activations, SAEConfig(steps=300, max_rounds=2, refine_steps=200)
    assert "dense code" in measured(gauss, config, 1).table.warning[0]
    assert "dense code" in measured(sparse, replace(config, l1=.02, grow=False), 1).table.warning[0]
    searched = measured(sparse, replace(config, l1=.02), 1).table.iloc[0]
    assert "dense code" in searched.warning or searched.effective_features == pytest.approx(16, rel=.05)
    assert "dense code" not in measured(sparse, config, 1).table.warning[0]


@pytest.mark.parametrize("kind", ["relu", "sparse_coding"])
def test_nothing_fires(kind):
    m = measured(config=replace(QUICK, kind=kind, l1=1e5, warmup=0, lr=.1, steps=300, refine_steps=20))
    for t in (m.table, m.per_seed):
        assert (t[["effective_features", "low", "high", "superposition"]] == 0).all(axis=None) and (t.warning == "nothing fires").all()
    m.plot()


def diverging(monkeypatch, which):
    "The estimator, of whose stack the members `which` end in NaN."
    def train(*args):
        t = train_sae(*args)
        for i in which:
            for p in t.sae.parameters(): p.data[i] = math.nan
            t.table.loc[i, ["effective_features", "fvu"]] = math.nan
            t.table.loc[i, "converged"] = False
        return t
    monkeypatch.setattr(module, "train_sae", train)


@pytest.mark.parametrize("kind", ["relu", "sparse_coding"])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]], ids=str)
def test_a_diverged_seed_is_reported_and_the_other_layers_kept(monkeypatch, tmp_path, which, kind):
    layers, config = {"a": X, "b": X + 1}, replace(QUICK, kind=kind, refine_steps=20)
    good = measured(layers, config)
    diverging(monkeypatch, which)
    m = measured(layers, config)
    assert "diverged" in m.table.warning[0] and not m.table.converged[0]
    assert [w == "diverged" for w in m.per_seed.warning] == [i in which for i in range(4)]
    pd.testing.assert_series_equal(m.table.loc[1], good.table.loc[1])
    m.plot()
    m.save(tmp_path / "m.json")
    pd.testing.assert_frame_equal(Measurement.load(tmp_path / "m.json").table, m.table)
    assert "nan" in repr(m) and "flagged" in repr(m)


def test_one_seed_in_which_nothing_fires_is_not_passed_over():
    "The mean of 10, 12 and nothing is no measurement, and certainly not one without an error."
    rows = [GOOD | dict(effective_features=F, fvu=fvu) for F, fvu in [(10., .1), (0., 1.), (12., .1)]]
    row = module.layer_row(rows, .95)
    assert row["warning"] != "" and not row["low"] == row["effective_features"] == row["high"]


def test_a_layer_that_fires_in_too_few_clusters_is_flagged_and_the_others_kept():
    "Two loud samples; all others are silent beside them."
    x = 1e-6 * torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    x[5], x[60] = 1., -2.
    m = measured({"rare": x, "b": X}, seeds=1)
    assert m.table.warning[0] != "" and not (m.table.low[0] == m.table.high[0] > 0)
    assert m.table.effective_features[1] == pytest.approx(measured(X, seeds=1).table.effective_features[0], rel=1e-3)
    m.plot(), repr(m)


def test_too_few_clusters_are_refused_by_layer():
    with pytest.raises(ValueError, match="layer 'b'.*cluster"):
        measured({"a": X, "b": Activations(X, torch.arange(600) % 2)})


# --- networks

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 9, 6)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


def test_measure_is_capture_and_measure_activations():
    torch.manual_seed(0)
    net, images = Net().train(), torch.rand(80, 1, 5, 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    m = measure(net, images, ["conv", "fc"], QUICK, seeds=1, max_samples=300, progress=False)
    assert m.table.layer.tolist() == ["conv", "fc"] and m.table.n_neurons.tolist() == [4, 6] and m.table.n_samples.tolist() == [300, 80]
    assert m.table.equals(measured(capture(net, images, ["conv", "fc"], max_samples=300), seeds=1).table)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(80)), batch_size=7)
    assert measure(net, batches, "fc", QUICK, seeds=1, progress=False).table.n_samples.tolist() == [80]
    with pytest.raises(KeyError, match="no layer 'conv1'; did you mean 'conv'"):
        measure(net, images, ["conv1"], QUICK)


# --- bad input

@pytest.mark.parametrize("x, says", [
    ({}, "activations is empty"), ({"a": X, "b": X * math.nan}, "layer 'b': activations hold 4800 NaN"), ({"a": X[:1]}, "layer 'a': activations hold one sample"),
    (torch.ones(9, 3), "layer 'activations': activations are constant"), ({"a": X.half()}, "layer 'a'.*float16"), ({"a": X[None]}, "layer 'a'.*shape"),
    ({"a": X.tolist()}, "layer 'a'.*got list"), ([X, X], "got list"), (Activations(torch.zeros(0, 3), torch.zeros(0)), "none of them 0")], ids=range(9))
def test_bad_activations(x, says):
    with pytest.raises(ValueError, match=says):
        measured(x)


# --- files

def same(a, b):
    pd.testing.assert_frame_equal(a.table, b.table, check_exact=True)
    pd.testing.assert_frame_equal(a.per_seed, b.per_seed, check_exact=True)
    assert a.settings == b.settings and repr(a) == repr(b)


def test_files_are_exact(two, tmp_path):
    two.save(tmp_path / "new" / "m.json")
    same(Measurement.load(tmp_path / "new" / "m.json"), two)
    s = two.settings
    assert s["seeds"] == [0, 1] and s["level"] == .95 and s["estimator"]["expansion"] == 4 and "torch" in s["versions"]


def test_files_with_nan_and_infinity(two, tmp_path):
    table = two.table.assign(effective_features=[math.nan, 3.], fvu=[math.inf, 1 / 3], warning=["diverged", "ä; –"])
    odd = Measurement(table, two.per_seed, two.settings)
    odd.save(str(tmp_path / "m.json"))
    same(Measurement.load(str(tmp_path / "m.json")), odd)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_write_that_fails_leaves_the_old_file(two, tmp_path, monkeypatch, error):
    two.save(tmp_path / "m.json")
    def half(self, text):
        with open(self, "w") as f: f.write(text[:100])
        raise error
    monkeypatch.setattr(module.Path, "write_text", half)
    with pytest.raises(error):
        measured(seeds=1).save(tmp_path / "m.json")
    monkeypatch.undo()
    same(Measurement.load(tmp_path / "m.json"), two)
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


def test_file_cut_short(two, tmp_path):
    two.save(tmp_path / "m.json")
    whole = (tmp_path / "m.json").read_bytes()
    for cut in range(0, len(whole), 97):
        (tmp_path / "m.json").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="m.json is not a whole measurement file"):
            Measurement.load(tmp_path / "m.json")


@pytest.mark.parametrize("content, says", [(b"\x89PNG\r\n\x1a\n", "not a whole"), (b"\xff\xfe", "not a whole"), (b"[]", "not written by"), (b"3", "not written by"),
                                           (b'{"format": "other"}', "not written by"), (b'{"table": {}}', "not written by")])
def test_foreign_files(tmp_path, content, says):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Measurement.load(tmp_path / "m.json")
    with pytest.raises(FileNotFoundError):
        Measurement.load(tmp_path / "missing.json")


@pytest.mark.parametrize("change", [dict(table=None), dict(table=3), dict(settings=None), dict(table={"layer": ["a"]}), dict(per_seed={"a": [1], "b": [1, 2]})], ids=str)
def test_file_with_a_part_missing_or_changed(two, tmp_path, change):
    two.save(tmp_path / "m.json")
    d = json.loads((tmp_path / "m.json").read_text()) | change
    (tmp_path / "m.json").write_text(json.dumps({k: v for k, v in d.items() if v is not None}))
    with pytest.raises(ValueError, match="m.json"):
        Measurement.load(tmp_path / "m.json")


# --- what is seen

def test_plot(two):
    ax = plt.subplots()[1]
    assert two.plot(ax) is ax and two.plot() is not ax
    assert [t.get_text() for t in ax.get_xticklabels()] == ["fc", "dense"] and ax.get_ylim()[0] == 0
    assert [p.get_height() for p in ax.patches] == [8, 6]  # neurons
    points = {line.get_xdata()[0]: line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())}
    flags = two.table.warning != ""
    for i, row in two.table.iterrows():
        assert points[i].get_ydata()[0] == row.effective_features
        assert (to_rgba(points[i].get_markerfacecolor()) == to_rgba("white")) == flags[i]
        assert to_rgba(points[i].get_markeredgecolor()) == to_rgba(COLOURS["flagged" if flags[i] else "ours"])
    spans = [tuple(line.get_ydata()) for line in ax.lines if line.get_marker() == "None"]
    assert spans == list(zip(two.table.low, two.table.high))


def test_plot_shows_flags():
    m = Measurement(pd.DataFrame([GOOD, GOOD | dict(layer="b", warning="dense code")]).drop(columns=["seed", "stderr", "df", "shift"]), pd.DataFrame([GOOD]), {})
    ax = m.plot()
    faces = [to_rgba(line.get_markerfacecolor()) == to_rgba("white") for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert faces == [False, True] and "flagged" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_repr(two):
    row = pd.DataFrame([GOOD | dict(effective_features=20.123456, low=19.04, fvu=.12345, dead_fraction=.999, superposition=2.0123)])
    text = repr(Measurement(row.drop(columns=["seed", "stderr", "df", "shift"]), row, {}))
    assert text.startswith("Superposition of 1 layer(s), 1 seed(s)\n") and "flagged" not in text
    assert text.splitlines()[2].split() == ["a", "10", "20.1", "19.0", "21.0", "2.01", "80", "99", "3.0", "0.123", "1.00", "True"]
    assert "1 seed(s)" not in repr(two) and "flagged" in repr(two)
    assert "<table" in two._repr_html_() and "dense code" in two._repr_html_()
    header = "layer n_neurons effective_features low high superposition warning n_features n_samples l0 fvu dead_fraction converged".split()  # a warning is seen without scrolling
    assert repr(two).splitlines()[1].split() == re.findall("<th>(.*?)</th>", two._repr_html_()) == header and list(two.table)[-1] == "warning"


@pytest.mark.parametrize("progress", [True, False])
def test_bars_can_be_switched_off(monkeypatch, capsys, progress):
    true = runs.tqdm
    monkeypatch.setattr(runs, "tqdm", lambda *a, **k: true(*a, **k | dict(delay=0, mininterval=0)))
    measure(Net(), torch.rand(20, 1, 5, 5), "fc", QUICK, seeds=1, progress=progress)
    out, err = capsys.readouterr()
    assert out == "" and (("training 1 autoencoder" in err and "capture" in err) if progress else err == "")


# --- a run that is killed

KILLED = """
import os, signal, torch
from superposition_lc import measurement
from superposition_lc.sae import SAEConfig
true, calls = measurement.train_sae, []
def train(*args):
    calls.append(args)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return true(*args)
measurement.train_sae = train
measurement.measure_activations(torch.load("layers.pt", weights_only=True), SAEConfig(**{config}), 2, progress=False, store="kept")
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_table(tmp_path, monkeypatch):
    "Killed as the second of three layers begins: the first is not trained again."
    layers = {"a": X, "b": X + 1, "c": X[:, :5].contiguous()}
    torch.save(layers, tmp_path / "layers.pt")
    killed = subprocess.run([sys.executable, "-c", KILLED.replace("{config}", repr(asdict(QUICK)))], cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert killed.returncode == -signal.SIGKILL and len(list((tmp_path / "kept").glob("*.json"))) == 1
    calls, true = [], train_sae
    monkeypatch.setattr(module, "train_sae", lambda x, *a: (calls.append(x.shape[-1]), true(x, *a))[1])
    resumed, fresh = measured(layers, store=tmp_path / "kept"), measured(layers, store=tmp_path / "new")
    assert calls == [8, 5] + [8, 8, 5]
    same(Measurement(resumed.table, resumed.per_seed, {}), Measurement(fresh.table, fresh.per_seed, {}))
    assert kinds(resumed.table) == COLUMNS and resumed.table.effective_features.tolist() == pytest.approx(measured(layers).table.effective_features.tolist(), rel=1e-3)


def test_a_store_knows_other_data_and_other_settings(tmp_path, monkeypatch):
    a = measured(store=tmp_path)
    for change in (dict(x=X + 1), dict(x=Activations(X, torch.arange(600) // 2)), dict(config=replace(QUICK, l1=.5)), dict(seeds=[0, 2]), dict(level=.9)):
        assert not measured(**change, store=tmp_path).table.equals(a.table), change
    monkeypatch.setattr(module, "train_sae", None)
    same(Measurement(measured(store=tmp_path).table, a.per_seed, {}), Measurement(a.table, a.per_seed, {}))
    with pytest.raises(ValueError, match="seeds must differ"): measured(seeds=[1, 1], store=tmp_path)
    with pytest.raises(FailedCells, match="(?s)layer='b'.*NoneType"): measured({"b": X}, store=tmp_path)
