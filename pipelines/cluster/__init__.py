"""Ray: sessions, fan-out, training and jobs. The only package that imports ray; it does not know what a shard or a model is."""
