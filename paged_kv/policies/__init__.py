"""Policies: one method, one file. Each decides which entries survive a compaction."""
