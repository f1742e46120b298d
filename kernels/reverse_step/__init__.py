"""One step of the reverse process, in place.

A sampler is a table of coefficients: row i holds, for the i-th step it takes,

    0 x0_from_x     x_0 prediction = [0] x_t + [1] out
    1 x0_from_out
    2 mean_from_x0  mean = [2] clip(x_0 prediction) + [3] x_t + [4] out
    3 mean_from_x
    4 mean_from_out
    5 sigma         standard deviation of the noise (fixed variances and DDIM); 0 on the last step
    6 log_var_low   learned variance: its logarithm's lower and upper ends
    7 log_var_high

and so every parameterization, every variance and DDIM with any eta are rows, not code.
"""

COLUMNS = 8
FIXED, LEARNED, LEARNED_RANGE = 0, 1, 2
