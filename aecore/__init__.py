"""Autoencoders, and the data path around them: shards in, latent tables out."""
