"""Deterministic autoencoders."""

from aecore.vanilla._autoencoder import AE, AEDecodeOutput, AEEncodeOutput, AEOutput, AESpec

__all__ = ["AE", "AEDecodeOutput", "AEEncodeOutput", "AEOutput", "AESpec"]
