"""What this machine is: profile, limits, GPUs, frameworks."""
