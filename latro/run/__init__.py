"""Runs that can be stopped and resumed: checkpoints, signals, timing."""
