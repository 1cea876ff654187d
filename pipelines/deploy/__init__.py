"""Flows on a Prefect server: served by this process (`serve.py`), or deployed to a work pool whose workers run them (`pool.py`).

Both create the same deployments of a recipe (`recipes.py`): one per flow, with the recipe's tree as its parameter.
"""

POOL = "aepipe"  # work pool of the deployments
