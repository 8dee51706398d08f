"""One HTML page about one or several runs, which needs no other file and no network."""
