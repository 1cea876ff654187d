"""Train a model: `job` (specs, identity, checks), `session` (what is opened once), `loop` (fit), and the parts that they use."""
