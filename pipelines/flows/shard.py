"""Prefect flow: raw data to a dataset of shards."""

from pipelines.flows.factory import make_flow

shard_flow = make_flow("shard")
