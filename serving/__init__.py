"""ONNX export with a parity check, precision variants, ONNX Runtime sessions and batch inference."""
