"""Chaos: runs that are killed, or lose their disk, at random moments, and must still come to their result."""
