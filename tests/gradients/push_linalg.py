"""Linear algebra and complex numbers, for `test_pushforward`."""

from __future__ import annotations

import torch
from pushes import case

M = (3, 4)


def _positive(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT + torch.eye(len(x), dtype=x.dtype)


LINALG = [
    case("solve", torch.linalg.solve, (3, 3), (3, 2)),
    case("inv", lambda x: (x.inverse(), torch.linalg.pinv(x)), (3, 3)),
    case("cholesky", lambda x: torch.linalg.cholesky(_positive(x)), (3, 3)),
    case(
        "cholesky_solve",
        lambda x, y: torch.cholesky_solve(y, torch.linalg.cholesky(_positive(x))),
        (3, 3),
        (3, 2),
    ),
    case(
        "triangular",
        lambda x, y: torch.linalg.solve_triangular(x.tril(), y, upper=False),
        (3, 3),
        (3, 2),
    ),
    case("svd", lambda x: (torch.linalg.svd(x, full_matrices=False).S, torch.linalg.svdvals(x)), M),
    case(
        "svd vectors", lambda x: [u.abs() for u in torch.linalg.svd(x, full_matrices=False)], (3, 3)
    ),
    case("eigh", lambda x: [v.abs() for v in torch.linalg.eigh(_positive(x))], (3, 3)),
    case("eig", lambda x: torch.linalg.eigvals(x).abs(), (3, 3)),
    case("qr", torch.linalg.qr, (4, 3)),
    case("lu", lambda x: torch.linalg.lu(x)[1:], (3, 3)),
    case(
        "det",
        lambda x: (torch.linalg.det(x), torch.slogdet(x)[1], torch.logdet(_positive(x))),
        (3, 3),
    ),
    case(
        "matrix_exp",
        lambda x: (torch.linalg.matrix_exp(x), torch.linalg.matrix_power(x, 3)),
        (3, 3),
    ),
    case("lstsq", lambda x, y: torch.linalg.lstsq(x, y).solution, (4, 3), (4, 2)),
    case("householder", lambda x, t: torch.linalg.householder_product(x, t), (4, 3), (3,)),
]

COMPLEX = [
    case("conj_physical", torch.conj_physical, M, dtype=torch.complex128),
    case("fft", lambda x: (torch.fft.fft(x), torch.fft.rfft(x), torch.fft.fft2(x)), M),
    case("ifft", lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, n=4), M),
    case(
        "stft",
        lambda x: torch.stft(x, 4, window=torch.ones(4, dtype=x.dtype), return_complex=True).abs(),
        (16,),
    ),
    case("complex", lambda x, y: (torch.complex(x, y).abs(), torch.polar(x.exp(), y).real), M, M),
    case(
        "parts",
        lambda z: (z.real, z.imag, z.abs(), z.angle(), z.conj(), z.resolve_conj()),
        M,
        dtype=torch.complex128,
    ),
    case(
        "products",
        lambda z, w: (z @ w, z * w.mT, z / w.mT, z + 2 * w.mT),
        M,
        (4, 3),
        dtype=torch.complex128,
    ),
    case("views of pairs", lambda x: torch.view_as_complex(x).exp(), (3, 2)),
    case(
        "functions",
        lambda z: (z.exp(), z.sin(), z.pow(2), z.sgn(), z.sum(), z.sigmoid()),
        M,
        dtype=torch.complex128,
    ),
]
