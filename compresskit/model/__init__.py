"""From a transformers checkpoint to targets and weights, and back into a folder that transformers loads."""
