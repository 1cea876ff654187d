"""Prefect flow: a model scored on a split of a dataset."""

from pipelines.flows.factory import make_flow

evaluate_flow = make_flow("evaluate")
