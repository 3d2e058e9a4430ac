"""Tiers below the device: entries that were dropped, in host memory and in files."""
