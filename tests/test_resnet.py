"""Figure 9: five layers of a ResNet-18, the published numbers beside ours, nothing computed where data is missing."""
import math
from dataclasses import replace

import pandas as pd
import pytest

from superposition_lc.experiments import resnet, sweep
from superposition_lc.experiments.resnet import LAYERS, SCALES, by_layer, comparison, report, run
from superposition_lc.experiments.sweep import READINGS
from superposition_lc.report import judged
from superposition_lc.sae import SAEConfig
from superposition_lc.statistics import figure_9, planted_table

ORDER = ["relu1", "layer1", "layer2", "layer3", "layer4"]
QUICK = dict(n_train=40, n_test=20, attack_steps=1, eval_steps=1, epochs=1, n_samples=40, octaves=(-2, 0), default=SAEConfig(expansion=2, steps=20, max_rounds=1, refine_steps=10, warmup=5),
             released=SAEConfig.released(expansion=2, epochs=2))


@pytest.fixture(scope="module")
def config():
    "The smoke scale, smaller."
    smoke = SCALES["smoke"]
    return replace(smoke, grids=(replace(smoke.grids[0], cell=replace(smoke.grids[0].cell, **QUICK)),))


@pytest.fixture(scope="module")
def table(config):
    return run(config, progress=False)


def planted(early, late, widths=(.25, .5, 1., 2.)):
    "Networks of three seeds in which early layers change by one factor from radius 0 to .03, and late ones by another, in two readings."
    factors = {layer: early if layer in LAYERS["early layers"] else late for layer in ORDER}
    return pd.concat([planted_table(lambda k, w: (f - 1) / .03, datasets=("cifar10",), n_classes=(10,), architecture="resnet18", widths=widths, layers={layer: 1000}, eps=(0., .03),
                                    reading=r, network_sd=1e-3, inputs_sd=1e-4, seed=i)
                      for i, (layer, f) in enumerate(factors.items()) for r in READINGS[:2]]).assign(warning="")


def verdicts(rows): return judged(rows).set_index("quantity").verdict.to_dict()


def test_scales():
    "As published, apart from what the page says; the sweep keeps no second copy of it."
    assert list(SCALES) == ["smoke", "laptop", "paper"]
    cells = {name: s.cells() for name, s in SCALES.items()}
    assert {c.architecture for cs in cells.values() for c in cs} == {"resnet18"} and {c.dataset for c in cells["smoke"]} == {"digits"}
    assert {(c.width, c.eps) for c in cells["paper"]} == {(w, e) for w in (.25, .5, 1, 2) for e in (0, .01, .02, .03)} and len(cells["paper"]) == 48
    assert {(c.dataset, c.n_train, c.epochs, c.lr, c.attack_steps, c.n_classes) for c in cells["paper"]} == {("cifar10", None, 200, .1, 10, 10)}
    assert {(c.dataset, c.width, c.eps) for c in cells["laptop"]} == {("cifar10_4000", w, e) for w in (.125, .25) for e in (0, .03)} and len(cells["laptop"]) == 12
    assert all(c.default == SAEConfig.quick() for name in ("laptop", "paper") for c in cells[name])
    assert "resnet18" not in {c.architecture for s in sweep.SCALES.values() for c in s.cells()}


def test_one_row_a_network_layer_input_and_reading(table):
    keys = ["width", "eps", "seed", "layer", "inputs", "reading"]
    assert len(table) == 2 * 2 * 5 * 2 * 3 and not table.duplicated(keys).any() and list(dict.fromkeys(table.layer)) == ORDER
    assert table.groupby("layer").n_neurons.first()[ORDER].tolist() == [4, 4, 8, 16, 32] and table.effective_features.map(math.isfinite).all()


def test_the_figure_has_a_line_a_layer_and_a_panel_a_width(table):
    fig = figure_9(table, "default")
    ax, = fig.axes
    assert [t.get_text() for t in fig.legends[0].get_texts()][:5] == ORDER and ax.get_title("left") == "width 0.0625"
    assert len(figure_9(planted(.5, 4.), "released").axes) == 4


def test_by_layer_has_the_changes_and_marks_what_is_flagged():
    t = planted(.5, 4., (.25,))
    t.loc[t.layer == "layer4", "warning"] = "dense code"
    shown = by_layer(t)
    assert shown.shape == (5, 4) and shown.index.get_level_values("layer").tolist() == ORDER
    assert shown.loc[(.25, "relu1"), ("default", "clean")].startswith("0.50 [0.") and shown.loc[(.25, "layer4"), ("default", "clean")].startswith("4.0")
    assert shown.map(lambda s: s.endswith("*")).all(axis=1).tolist() == [False] * 4 + [True]


def test_report_writes_the_figure_in_every_reading(table, config, tmp_path):
    said = report(table, config, tmp_path)
    assert {f"figure-9-{r}.png" for r in READINGS} | {"changes.csv", "figure-readings.png"} <= {p.name for p in tmp_path.iterdir()}
    assert "4 networks, 2 seed(s)" in said and said.count("layer4") == 1 and not list(tmp_path.glob("figure-7*"))


@pytest.mark.parametrize("early, late, down, up, quarter", [(.5, 4., "agrees", "agrees", "differs"), (.9, .8, "differs", "differs", "agrees"), (.5, 1., "agrees", "differs", "cannot tell")])
def test_comparison_holds_ratios_against_the_published(early, late, down, up, quarter):
    said = verdicts(comparison(planted(early, late), SCALES["paper"]))
    assert len(said) == 8
    for reading in READINGS[:2]:
        assert said[f"F / F(0) down to, ResNet-18, early layers, {reading}"] == down and said[f"F / F(0) up to, ResNet-18, layers 3 and 4, {reading}"] == up
        assert said[f"layers 3 and 4 do not rise at width 1/4, {reading}"] == quarter


def test_comparison_finds_a_planted_trend():
    "A slope that rises by 31 with each e-fold of the width."
    slope = lambda k, w: 31. * math.log(w / .25)
    t = pd.concat([planted_table(slope, datasets=("cifar10",), n_classes=(10,), architecture="resnet18", widths=(.25, .5, 1., 2.), layers={"layer4": 1000}, eps=(0., .01, .02, .03), reading=r,
                                 network_sd=.002, inputs_sd=.001) for r in READINGS[:2]]).assign(warning="")
    rows = comparison(t, SCALES["paper"])
    assert verdicts(rows)["H3, slope per log width, ResNet-18, default"] == "agrees" and rows[0]["ours"] == pytest.approx(31, abs=1)


def test_comparison_says_what_is_smaller_and_what_is_missing(table, config):
    rows = {r["quantity"]: r for r in comparison(table, config)}
    assert {r["figure"] for r in rows.values()} == {"9"}
    assert rows["F / F(0) down to, ResNet-18, early layers, released"]["reason"] == "40 images of digits, 1 epochs, width 0.0625"
    assert math.isnan(rows["layers 3 and 4 do not rise at width 1/4, default"]["ours"])  # no such width
    assert verdicts(rows.values())["H3, slope per log width, ResNet-18, default"] == "cannot tell"


def test_data_that_is_missing_is_found_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "run_cells", lambda *a, **k: pytest.fail("computed"))
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cifar-10-binary.tar.gz is missing. Fix"):
        run(SCALES["laptop"], progress=False)
