"""``robust rl imitate``: clone an expert under a hard bound on how far the clone amplifies measurement errors."""
