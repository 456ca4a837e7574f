"""ONNX: export with proof of parity, sessions, batch inference."""
