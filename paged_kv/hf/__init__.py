"""transformers: the only folder, besides models.py, that imports it."""
