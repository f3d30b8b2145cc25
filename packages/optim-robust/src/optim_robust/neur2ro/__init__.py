"""Neur2RO: two-stage robust problems by column-and-constraint generation with a learned inner problem."""
