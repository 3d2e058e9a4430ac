"""vLLM's front end: options, refusals, the plan; before any process of an engine starts."""
