"""A run's parameters, metrics and use of the machine in MLflow, sent by a process of its own."""
