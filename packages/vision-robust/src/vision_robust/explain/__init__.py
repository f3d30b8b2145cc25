"""Classifiers and tools that say why: prototypes, counterfactuals, memorisation."""
