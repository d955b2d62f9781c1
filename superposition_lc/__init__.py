"""Measure superposition in neural networks: how many features a layer uses, with an interval."""

__version__ = "0.1.0"
