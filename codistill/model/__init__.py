"""Models as trained (policy) and as on the disk (pretrained); transformers is imported here only."""
