"""The panel of a run in a notebook: the question before it, its progress, its buttons."""
