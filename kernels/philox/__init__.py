"""Counter-based random numbers: Philox4x32-10, and the counter that names a draw.

Every random number of the project is a pure function of

    (seed, step, image, stream, block)

`seed` is the 64-bit key; the four 32-bit counter words are

    c0 = block    which group of four 32-bit outputs within one image
    c1 = image    which image: its seed when sampling, its place in the global batch when training
    c2 = step     training step, or diffusion timestep when sampling
    c3 = stream   the purpose of the number (`STREAM_*`); dropout adds its layer above the low byte

Therefore a draw does not depend on batch size, world size, device or restarts.
Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

STREAM_INITIAL = 0  # x_T
STREAM_REVERSE = 1  # z of a reverse step
STREAM_FORWARD = 2  # eps of q(x_t | x_0)
STREAM_EXAMPLE = 3  # a training example's t, flip and dropped label
STREAM_ORDER = 4  # data order; step is the epoch, image the example's index
STREAM_BOUND = 5  # eps of the bound's terms; at step T, which is no timestep, the order that assigns terms to images
STREAM_RENOISE = 6  # eps that takes a state of the reverse chain back to an earlier one; step counts how often
STREAM_PAD = 7  # the codec's pads: step is the timestep, image the number of a group of images
STREAM_FLOW = 9  # of the likelihood by the ODE: step is 2 draw for what is added to pixels, 2 draw + 1 for the probe
STREAM_DROPOUT = 8  # dropout masks; stream = STREAM_DROPOUT + 256 * layer
