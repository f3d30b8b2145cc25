"""Training together: one node program, driven in one process, in real processes, or by another engine."""
