"""Aggregation of vectors of which some may be wrong: rules, attacks, what can be proved."""
