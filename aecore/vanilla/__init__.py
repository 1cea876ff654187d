"""Deterministic autoencoders: plain, denoising, sparse."""

from aecore.vanilla._autoencoder import AE, AEDecodeOutput, AEEncodeOutput, AEOutput, AESpec
from aecore.vanilla._denoising import DenoisingAE, DenoisingAESpec
from aecore.vanilla._sparse import SparseAE, SparseAESpec

__all__ = [
    "AE",
    "AEDecodeOutput",
    "AEEncodeOutput",
    "AEOutput",
    "AESpec",
    "DenoisingAE",
    "DenoisingAESpec",
    "SparseAE",
    "SparseAESpec",
]
