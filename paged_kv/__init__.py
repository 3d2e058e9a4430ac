"""KV-cache compression for vLLM and transformers. Imports nothing: every process loads it."""

__version__ = "0.1.0"
