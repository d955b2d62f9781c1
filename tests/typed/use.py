"Never run: what a user writes with every public name, for a type checker (tests/test_types.py)."
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from superposition_lc import (
    Activations, Measurement, MergedFeatures, RateDistortion, SAEConfig, ShareAccumulator, SparseAutoencoder, capture, effective_features, export_sae, feature_shares,
    hill_number, load_dataset, load_sae, local_learning_coefficient, measure, measure_activations, merge_split_features, planted_activations, rate_distortion,
    recurring_features, train_sae)


def shares(codes: Tensor) -> float:
    p = assert_type(feature_shares(codes), Tensor)
    acc = ShareAccumulator(codes.shape[1], n_groups=20)
    acc.update(codes)
    acc.update(codes, clusters=torch.arange(len(codes)))
    both = assert_type(acc.merge(ShareAccumulator(codes.shape[1], n_groups=20)), ShareAccumulator)
    e = both.estimate()
    assert_type(both.shares, Tensor)
    return assert_type(effective_features(p), float) + assert_type(hill_number(p, order=2), float) + assert_type(e.value, float) + e.low + e.high + e.stderr


def autoencoders(x: Tensor) -> SparseAutoencoder:
    config = SAEConfig(expansion=4, kind="topk", k=3)
    assert_type(SAEConfig.released(epochs=5), SAEConfig)
    trained = train_sae(x, [config, SAEConfig()], seeds=3, progress=False)
    assert_type(trained.table, pd.DataFrame)
    sae = assert_type(trained.sae, SparseAutoencoder)
    z = assert_type(sae.encode(x), Tensor)
    assert_type(sae.decode(z), Tensor)
    sae.save("sae.safetensors")
    return assert_type(SparseAutoencoder.load("sae.safetensors"), SparseAutoencoder)


def measured(model: nn.Module, x: Tensor) -> pd.DataFrame:
    layers = assert_type(capture(model, x, ["relu1", "relu2"]), dict[str, Activations])
    m = assert_type(measure(model, [x, x], layers=["relu1"], seeds=2), Measurement)
    measure_activations(layers)
    measure_activations(Activations(x, torch.arange(len(x))), SAEConfig(), seeds=[3, 4])
    m.save("m.json")
    m.plot(ax=None)
    assert_type(Measurement.load("m.json"), Measurement)
    curve = assert_type(rate_distortion(x, [.1, .3], seeds=2), RateDistortion)
    assert_type(curve.at(.1), pd.DataFrame)
    return assert_type(m.table, pd.DataFrame)


def others(model: nn.Module, x: Tensor, y: Tensor) -> None:
    sae = load_sae("folder")
    z = assert_type(sae.encode(x), Tensor)
    export_sae(autoencoders(x), "folder")
    merged = assert_type(merge_split_features(z), MergedFeatures)
    assert_type(merged.effective_features, float)
    assert_type(recurring_features(z, z), Tensor)
    data = load_dataset("digits", n_train=100)
    assert_type(data.x_train, Tensor)
    planted_activations(64, 32, 1000)
    states: Mapping[str, Tensor] = {n: p[None] for n, p in model.named_parameters()}
    assert_type(local_learning_coefficient(model, x, y, states).table, pd.DataFrame)


def refused_by_the_checker(model: nn.Module, x: Tensor) -> None:
    "Each line is an error that the annotations let a checker find; an ignore that is not needed is reported, too."
    SAEConfig(l1="0.6")  # type: ignore[arg-type]
    SAEConfig(penalty=.6)  # type: ignore[call-arg]
    measure(model, x, layer=["relu1"])  # type: ignore[call-arg]
    measure(model, x, ["relu1"], seeds="3")  # type: ignore[arg-type]
    measure(model, x, ["relu1"]).tables  # type: ignore[attr-defined]
    capture(model, x, ["relu1"])[0]  # type: ignore[index]
    hill_number(x, "one")  # type: ignore[arg-type]
    rate_distortion(x, .1)  # type: ignore[arg-type]
