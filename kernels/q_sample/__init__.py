"""The forward process: x_t and eps from images, in one pass."""
