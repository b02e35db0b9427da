"""The runner's side: engine, provisioner, journal, stopping, runner."""
