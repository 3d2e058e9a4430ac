"""Integers only: schedules, budgets, plans. Imports no torch and nothing else of paged_kv."""
