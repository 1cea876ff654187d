"""Variational autoencoders. The sampling layer has its own public module, `aecore.variational.stochastic_layers`."""

from aecore.variational._adagvae import AdaGVAE, AdaGVAEOutput, AdaGVAESpec
from aecore.variational._codebook import VectorQuantizer, VectorQuantizerOutput
from aecore.variational._conditional import ConditionalVAE, ConditionalVAESpec
from aecore.variational._gaussian import GaussianVAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational._recurrent import RecurrentVAE, RecurrentVAESpec
from aecore.variational._vae import VAE, VAESpec
from aecore.variational._vqvae import VQVAE, VQVAEDecodeOutput, VQVAEEncodeOutput, VQVAEOutput, VQVAESpec

__all__ = [
    "VAE",
    "VQVAE",
    "AdaGVAE",
    "AdaGVAEOutput",
    "AdaGVAESpec",
    "ConditionalVAE",
    "ConditionalVAESpec",
    "GaussianVAE",
    "RecurrentVAE",
    "RecurrentVAESpec",
    "VAEDecodeOutput",
    "VAEEncodeOutput",
    "VAEOutput",
    "VAESpec",
    "VQVAEDecodeOutput",
    "VQVAEEncodeOutput",
    "VQVAEOutput",
    "VQVAESpec",
    "VectorQuantizer",
    "VectorQuantizerOutput",
]
