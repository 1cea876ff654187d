"""Bytes to samples and back: records, images, arrays, tar members, the index, and the transform that a model reads through."""
