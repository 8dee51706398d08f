"""Models as trained (policy) and as on the disk (pretrained); the only user of transformers."""
