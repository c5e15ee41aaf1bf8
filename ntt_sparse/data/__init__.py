"""Arrays in: image sets, and batches of them drawn on the device."""
