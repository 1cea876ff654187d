"""Backbones: encoder and decoder networks for samples of any shape, each kind one file that registers its spec."""

from aecore.nn._backbone import Backbone
from aecore.nn._linear import LazyLinear, Linear, LinearPath, linear_path

__all__ = ["Backbone", "LazyLinear", "Linear", "LinearPath", "linear_path"]
