"""From a compressed folder to what runs elsewhere: ONNX, ONNX with 8-bit weights, an ordinary dense checkpoint."""
