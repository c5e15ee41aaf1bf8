"""How objectives are minimised: steps from named terms, chunks, loops, checkpoints, devices."""
