"""Many devices, one model: what they send instead of data, and how it is put together."""
