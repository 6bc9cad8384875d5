"""A run that can be stopped and resumed: checkpoints, signals, the time it takes."""
