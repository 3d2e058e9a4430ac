"""What both engines do with pages of entries, once: torch and numpy, and no engine.

vllm/worker/ and hf/ import it; it knows policies, tiers and kernels, and nobody above them. Nothing
here waits for a GPU: what is decided on the host stays there, in numpy arrays.
"""
