"""Variational autoencoders. The sampling layer has its own public module, `aecore.variational.stochastic_layers`."""

from aecore.variational._vae import VAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput, VAESpec

__all__ = ["VAE", "VAEDecodeOutput", "VAEEncodeOutput", "VAEOutput", "VAESpec"]
