"""Many runs: one after another, side by side, again and again."""
