"""`paged-kv top`: what a server's policy does, in a terminal, from its /metrics alone.

It imports no vLLM and no torch, and runs where neither is. Whatever a server sends is text of
somebody else: nothing of it reaches the terminal but through words.plain.
"""
