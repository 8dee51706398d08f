"""The commands of `python -m codistill`, one module each, whose `main` takes the arguments."""
