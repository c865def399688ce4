"""Graphs for ONNX Runtime's CPU provider: the same model with fewer and cheaper operators, at the same answers."""
