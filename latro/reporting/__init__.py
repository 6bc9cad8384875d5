"""What a run tells: metrics, plots, trackers, samples and the model card."""
