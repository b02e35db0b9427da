"""How long a run takes: by formula, by earlier runs, by its own first steps; always with an interval."""
