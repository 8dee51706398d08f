"""What a run writes and shows: metrics, files, the terminal, curves."""
