"""From sources to shards: plan, splits, packing, adopting, appending; the manifest is written last."""
