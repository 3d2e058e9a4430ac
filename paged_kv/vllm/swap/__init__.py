"""Preempted requests keep their pages: they move to a host tier and come back (docs/swap.md)."""
