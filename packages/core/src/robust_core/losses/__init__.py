"""Losses, one family a module: each maps (B, ...) to per-sample values or a scalar, as its docstring says."""
