"""Ways to bring an erased concept back."""
