"""Files, hashes, the hub, and writing that is complete or did not happen. Knows nothing of models."""
