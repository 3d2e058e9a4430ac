"""vLLM's engine core: pages are allocated, shared and freed by a schedule."""
