"""Defences at test time: no base model is retrained."""
