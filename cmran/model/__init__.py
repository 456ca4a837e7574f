"""The network, its losses and prediction rule, and its checkpoints."""
