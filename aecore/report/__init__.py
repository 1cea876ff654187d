"""The figures of a trained model: `figures` writes them, the other modules draw them."""
