"""The study: do the paper's claims show at toy scale? `make study`, docs/study.md."""
