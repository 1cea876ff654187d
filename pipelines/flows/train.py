"""Prefect flow: a dataset to a trained model."""

from pipelines.flows.factory import make_flow

train_flow = make_flow("train")
