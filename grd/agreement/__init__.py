"""Who agreed to how much: grants with a scope, caps and an end, their log, and what follows for a run."""
