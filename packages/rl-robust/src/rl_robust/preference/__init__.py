"""Preference training of language models (extra ``preference``)."""
