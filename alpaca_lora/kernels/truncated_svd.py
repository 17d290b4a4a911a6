"""The largest singular values of a matrix and their vectors: M is nearest to U_R diag(S_R) V_R^T among rank R
(Eckart and Young 1936).

By the whole decomposition, or by randomised subspace iteration (Halko et al. 2011, algorithm 4.4) for matrices whose
smaller side is above `EXACT_WIDTH`.
"""

from __future__ import annotations

import hashlib

import torch

EXACT_WIDTH = 1024  # a full decomposition of 1024 x 4096 takes 2.6 s on one core; wider ones are approximated
OVERSAMPLING, ITERATIONS = 16, 16


def truncated_svd(matrix_OD: torch.Tensor, rank: int, key: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, R), S (R,) in falling order and V^T (R, D); float32, on the CPU.

    ``key`` draws what is random. Signs are fixed by the largest entries of V, so that the result is a function of the
    arguments alone.
    """
    matrix_OD = matrix_OD.detach().to("cpu", torch.float32)
    if min(matrix_OD.shape) <= EXACT_WIDTH:
        u_OK, values_K, vt_KD = torch.linalg.svd(matrix_OD, full_matrices=False)
    else:
        digest = hashlib.sha256(key.encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            width = min(rank + OVERSAMPLING, *matrix_OD.shape)
            u_OK, values_K, v_DK = torch.svd_lowrank(matrix_OD, q=width, niter=ITERATIONS)
        vt_KD = v_DK.t()
    u_OR, values_R, vt_RD = u_OK[:, :rank], values_K[:rank], vt_KD[:rank]
    signs_R = vt_RD.gather(1, vt_RD.abs().argmax(1, keepdim=True)).sign().squeeze(1)
    return u_OR * signs_R, values_R, signs_R[:, None] * vt_RD
