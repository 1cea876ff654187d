"""Variational autoencoders. The sampling layer has its own public module, `aecore.variational.stochastic_layers`."""

from aecore.variational._adagvae import AdaGVAE, AdaGVAEOutput, AdaGVAESpec
from aecore.variational._conditional import ConditionalVAE, ConditionalVAESpec
from aecore.variational._recurrent import RecurrentVAE, RecurrentVAESpec
from aecore.variational._vae import VAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput, VAESpec

__all__ = [
    "VAE",
    "AdaGVAE",
    "AdaGVAEOutput",
    "AdaGVAESpec",
    "ConditionalVAE",
    "ConditionalVAESpec",
    "RecurrentVAE",
    "RecurrentVAESpec",
    "VAEDecodeOutput",
    "VAEEncodeOutput",
    "VAEOutput",
    "VAESpec",
]
