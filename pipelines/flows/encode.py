"""Prefect flow: a dataset and a model to a latent table."""

from pipelines.flows.factory import make_flow

encode_flow = make_flow("encode")
