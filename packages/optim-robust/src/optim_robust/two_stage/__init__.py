"""Two-stage robust problems: the representation, exact and classical methods."""
