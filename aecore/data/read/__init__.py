"""From shards to batches: layout, order, loaders, bags, pairs, streams; reading and verifying what is stored."""
