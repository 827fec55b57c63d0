"""Consensus: a sans-I/O core (quorum, consensus) and the driver that gives it time, a disk and waiters."""
