"""The embedded checkpoint; tasks and texts."""
