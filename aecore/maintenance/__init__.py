"""Maintenance of artefacts: `gc` removes files that are no longer needed, `compare` lists how two artefacts differ."""
