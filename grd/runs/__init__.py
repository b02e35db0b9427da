"""The record of a run: its folder, model, events, liveness and recovery."""
