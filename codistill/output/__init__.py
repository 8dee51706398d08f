"""What a run leaves and shows: metrics, files, terminal, curves."""
