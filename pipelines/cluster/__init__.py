"""Where the work runs. The only package that imports ray; nothing here knows what a shard or a model is."""
