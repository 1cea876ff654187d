"""The latent table: Parquet parts, the manifest that names them, and how they are opened and verified."""

from aecore.table.table import LatentTable, open_table

__all__ = ["LatentTable", "open_table"]
