"""Which image runs when, and at which degree; free of HTTP and of models."""
