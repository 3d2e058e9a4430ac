"""paged_kv inside vLLM. The only folder that imports vllm; importing it changes nothing in vLLM."""
