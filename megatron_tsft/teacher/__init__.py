"""Records of a teacher's predictions and the cache that keeps them, keyed by conversation."""
