"""Models, as trained (policy) and as on the disk (pretrained). The only importer of transformers."""
