"""Training with bit-identical resume, and inference with a trained network."""
