"""Prefect flow: external tars to a dataset, in place."""

from pipelines.flows.factory import make_flow

adopt_flow = make_flow("adopt")
