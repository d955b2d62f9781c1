"""Measure superposition in neural networks: how many features a layer uses, with an interval."""

__version__ = "0.1.0"

from superposition_lc.activations import Activations, capture
from superposition_lc.data import load_dataset, planted_activations
from superposition_lc.entropy import ShareAccumulator, effective_features, feature_shares, hill_number
from superposition_lc.llc import local_learning_coefficient
from superposition_lc.measurement import Measurement, measure, measure_activations
from superposition_lc.merging import MergedFeatures, merge_split_features, recurring_features
from superposition_lc.pretrained import export_sae, load_sae
from superposition_lc.rate_distortion import RateDistortion, rate_distortion
from superposition_lc.sae import SAEConfig, SparseAutoencoder, train_sae

__all__ = [
    "Activations", "Measurement", "MergedFeatures", "RateDistortion", "SAEConfig", "ShareAccumulator", "SparseAutoencoder", "capture", "effective_features",
    "export_sae", "feature_shares", "hill_number", "load_dataset", "load_sae", "local_learning_coefficient", "measure", "measure_activations", "merge_split_features",
    "planted_activations", "rate_distortion", "recurring_features", "train_sae",
]
