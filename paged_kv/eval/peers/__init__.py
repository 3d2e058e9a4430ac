"""What others have made, measured as our policies are. Each peer is asked the same prompts.

A peer that cannot run here is an error that says what to install: it is never left out silently.
"""
