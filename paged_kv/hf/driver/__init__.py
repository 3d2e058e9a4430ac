"""Models and texts for our own commands, with transformers."""
