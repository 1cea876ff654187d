"""Interfaces that every model shares: the autoencoder base class, its outputs, batches, what a trainer needs."""

from aecore._base.base import BaseAutoencoder, ModelOutput
from aecore._base.batch import Batch
from aecore._base.trainable import ModelSpec, Trainable

__all__ = ["BaseAutoencoder", "Batch", "ModelOutput", "ModelSpec", "Trainable"]
