"""What was found out with the trainer: one folder, one command and one report a study."""
