"""What a run, or a part of one, uses of the machine."""
