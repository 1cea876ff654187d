"""Encode a dataset with a trained model: `job` plans and commits, `worker` encodes one part, `encoder` runs the model on batches."""
