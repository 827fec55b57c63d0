"""What is on disk: the sealed append-only log, its indexes, checkpoints. ``interface`` is the contract."""
