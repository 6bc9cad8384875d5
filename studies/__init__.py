"""Studies made with the trainer: one folder, one command and one report each."""
