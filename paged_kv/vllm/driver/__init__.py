"""Engines that our own commands run: the demo, perplexity, generate."""
