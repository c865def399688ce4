"""Faults that are really caused; see docs/reliability.md."""
