"""generate_batch: many prompts in a bounded pool."""
