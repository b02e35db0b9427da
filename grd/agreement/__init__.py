"""Who agreed to how much: grants with a scope, caps and an end, the log of them, and what follows for a run."""
