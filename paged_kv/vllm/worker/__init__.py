"""vLLM's workers: what each step reads, and the compactions that follow it."""
