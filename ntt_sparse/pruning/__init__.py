"""What is cut: masks, the scores they are selected by, and densities per layer."""
