"""3x3 convolution of 8-bit floating-point numbers (e4m3): four bits of sign and mantissa, up to 448."""
