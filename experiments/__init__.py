"""One runnable module per study; see each module's `--help`."""
