"""Who runs the jobs of `aecore`, where, and what happens when they fail: command line, Prefect flows, Ray."""
