"""Point clouds: data, corruptions, perception under noise, and training that withstands it."""
