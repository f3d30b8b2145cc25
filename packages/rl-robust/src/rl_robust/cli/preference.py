"""``robust rl prefer · revise · steps``: language models from preferences, and from the steps that lost the answer."""
