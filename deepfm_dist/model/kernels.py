"""CPU kernels for the pairwise interactions: one pass over the rows, where torch takes seven."""

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled

FloatArray = npt.NDArray[np.float32]


@compiled
def interactions(rows: FloatArray, halves: FloatArray, firsts: FloatArray) -> FloatArray:
    """First and second order of a factorization machine, and what its gradient needs.

    Args:
        rows: ``[B, F, W]``; W is a multiple of 4.
        halves: ``[W]`` 0.5 for columns of factors, else 0.
        firsts: ``[W]`` 1 for the column of first-order weights, else 0.

    Returns:
        ``[B, W + 1]``: the sums over the fields by column, and the logit
        ``sum_d halves_d ((sum_f v_fd)^2 - sum_f v_fd^2) + sum_d firsts_d sum_f v_fd``.
    """
    batch, fields, width = rows.shape
    out = np.empty((batch, width + 1), np.float32)
    for b in range(batch):
        t0 = t1 = t2 = t3 = np.float32(0)
        for d in range(0, width, 4):
            s0 = s1 = s2 = s3 = np.float32(0)
            q0 = q1 = q2 = q3 = np.float32(0)
            for f in range(fields):
                v0, v1, v2, v3 = (
                    rows[b, f, d],
                    rows[b, f, d + 1],
                    rows[b, f, d + 2],
                    rows[b, f, d + 3],
                )
                s0 += v0
                s1 += v1
                s2 += v2
                s3 += v3
                q0 += v0 * v0
                q1 += v1 * v1
                q2 += v2 * v2
                q3 += v3 * v3
            out[b, d], out[b, d + 1], out[b, d + 2], out[b, d + 3] = s0, s1, s2, s3
            t0 += halves[d] * (s0 * s0 - q0) + firsts[d] * s0
            t1 += halves[d + 1] * (s1 * s1 - q1) + firsts[d + 1] * s1
            t2 += halves[d + 2] * (s2 * s2 - q2) + firsts[d + 2] * s2
            t3 += halves[d + 3] * (s3 * s3 - q3) + firsts[d + 3] * s3
        out[b, width] = (t0 + t1) + (t2 + t3)
    return out


@compiled
def add_gradient(
    gradient: FloatArray,
    logit_gradients_B: FloatArray,
    rows: FloatArray,
    sums: FloatArray,
    halves: FloatArray,
    firsts: FloatArray,
) -> None:
    """Adds the gradient of `interactions` by the rows.

    Args:
        gradient: ``[B, F, W]`` is added to.
        logit_gradients_B: ``[B]`` the gradient by the logits.
        rows: ``[B, F, W]`` as above.
        sums: ``[B, W + 1]`` what `interactions` returned.
        halves: ``[W]`` as above.
        firsts: ``[W]`` as above.
    """
    batch, fields, width = rows.shape
    for b in range(batch):
        g = logit_gradients_B[b]
        for f in range(fields):
            for d in range(width):
                pair = (halves[d] + halves[d]) * (sums[b, d] - rows[b, f, d])
                gradient[b, f, d] += g * (pair + firsts[d])
