"""Standard normal images from the counter-based generator."""
