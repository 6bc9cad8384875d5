"""Reports of a run: metrics, plots, trackers, samples and the model card."""
