"""Ways to erase a concept, each from its exact objective."""
