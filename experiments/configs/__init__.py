"""Settings of the studies, by name."""
