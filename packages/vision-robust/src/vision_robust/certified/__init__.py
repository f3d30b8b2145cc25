"""Training and inference with guarantees."""
