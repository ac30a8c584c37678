"""Functions of tensors, for `test_pushforward`."""

from __future__ import annotations

from functools import partial

import torch
from pushes import Case, case

M = (3, 4)


def _unary(names: str, inside: str = "{}") -> list[Case]:
    def of(name: str):
        function = getattr(torch, name)
        if inside == "positive":
            return lambda x: function(x.exp())
        if inside == "unit":
            return lambda x: function(x.tanh() * 0.9)
        return function

    return [case(name, of(name), M) for name in names.split()]


def _binary(names: str) -> list[Case]:
    cases = []
    for name in names.split():
        function = getattr(torch, name)
        cases.append(case(name, function, M, M))
        cases.append(case(f"{name}-broadcast", function, (3, 1), (2, 1, 4)))
    return cases


def _turned(x, y):
    z = torch.view_as_complex(torch.stack([x, y], -1)) * (1 + 2j)
    z = torch.cat([z[1:], z[:1]])
    parts = torch.stack([*z.conj().permute(1, 0).unbind(), z[0, 1].expand(3)]).reshape(5, 3)
    return torch.view_as_real(parts.transpose(0, 1))


def _written(x, *rows, at):
    view = (2 * x).t()
    view[at] = rows[0] if rows else 0.0
    return view


LABELS = torch.tensor([[0, 2, 1, 0], [2, 2, 0, 1]])
ROWS = torch.tensor([2, 0, 0])
MASK = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])

ELEMENTWISE = [
    *_unary(
        "abs asinh atan ceil cos cosh erf erfc exp exp2 expm1 floor frac neg nan_to_num reciprocal "
        "relu round sgn sigmoid sign sin sinc sinh tan tanh trunc positive square angle deg2rad "
        "conj_physical real"
    ),
    *_unary("log log10 log1p log2 rsqrt sqrt lgamma digamma i0", "positive"),
    *_unary("acos asin atanh erfinv", "unit"),
    case("acosh", lambda x: torch.acosh(1.5 + x.exp()), M),
    case("logit", lambda x: torch.logit(x.sigmoid(), 1e-6), M),
    *_binary(
        "add sub mul div atan2 fmax fmin maximum minimum hypot logaddexp logaddexp2 copysign "
        "remainder fmod true_divide rsub"
    ),
    case("xlogy", lambda x, y: torch.xlogy(x, y.exp()), M, M),
    case("xlog1py", lambda x, y: torch.special.xlog1py(x, y.exp()), M, M),
    case("pow", lambda x, y: x.exp() ** y, M, (3, 1)),
    case("powers of numbers", lambda x: (2.0**x, x**3, x**0.0, x**2, x.exp() ** 0.5), M),
    case("numbers", lambda x: (x * 2, 2 / x, 1 - x, x - 1, x + 3, x / 3, -x, 3 + x), M),
    case("alpha", lambda x, y: torch.add(x, y, alpha=3) - torch.sub(x, y, alpha=-2.5), M, (4,)),
    case("rsub alpha", lambda x, y: torch.rsub(x, y, alpha=2.5), M, (4,)),
    case("rounded division", lambda x, y: torch.div(x, y, rounding_mode="floor") + x, M, M),
    case("0-dim", lambda x, y: x * y + x / (2 + y.exp()) - y, (), M),
    case("0-dim alone", lambda x, y: x * y - y / x, (), ()),
    case("copied over", lambda x, y: (x * 2).copy_(y * y) * x, M, M),
    case("product with itself", lambda x: x * x / (1 + x.square()) + torch.where(x > 0, x, -x), M),
    case("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.7), M, M, (3, 1)),
    case("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.7), M, M, (3, 1)),
    case("lerp", lambda x, y, w: torch.lerp(x, y, w), M, M, M),
    case("lerp by a number", lambda x, y: torch.lerp(x, y, 0.3), M, M),
    case("clamp", lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0.1), x.clamp(max=0.1)), M),
    case("clamp to tensors", lambda x, a, b: x.clamp(a, b.exp()), M, M, M),
    case("clamp min", lambda x, a: x.clamp_min(a) + x.clamp_max(0.2), M, M),
    case("where", lambda x, y: torch.where(MASK, x, y), M, (4,)),
    case("where a number", lambda x: torch.where(MASK, x, 2.0) + torch.where(MASK, 1.0, x), M),
    case("masked_fill", lambda x, y: x.masked_fill(MASK, 2.0) + x.masked_fill(MASK, y), M, ()),
    case("bernoulli", lambda x: torch.bernoulli(x.sigmoid()) + x, M),
    case("zeros", lambda x: x.round() * x + torch.zeros_like(x), M),
    case("fill", lambda x, y: x.clone().fill_(y) + x, M, ()),
    case("mvlgamma", lambda x: torch.mvlgamma(3 + x.exp(), 2), M),
    case("cross", lambda x, y: torch.linalg.cross(x, y), (2, 3), (2, 3)),
    case(
        "float32", lambda x, y: (x.float() * 2).double() * y.half().double(), M, M, tolerance=1e-2
    ),
    case(
        "mixed", lambda x, y: x.float() * y + y @ y.float().double().mT, (), (3, 3), tolerance=1e-5
    ),
]

REDUCTIONS = [
    case("sum", lambda x: (x.sum(), x.sum(0), x.sum((0, -1), keepdim=True), x.sum(-1)), (3, 4, 2)),
    case("mean", lambda x: (x.mean(), x.mean(0), x.mean((0, -1), keepdim=True)), (3, 4, 2)),
    case("sum of converted", lambda x: x.sum(1, dtype=torch.float32).double(), M, tolerance=1e-5),
    case("var", lambda x: (x.var(), x.var(0), x.std(1, keepdim=True), x.std()), M),
    case("var_mean", lambda x: (*torch.var_mean(x, 0), *torch.std_mean(x)), M),
    case("prod", lambda x: (x.prod(), x.prod(1)), M),
    case("nothing varies", lambda x: (*torch.std_mean(0 * x, 0), (0 * x).norm(3, 1)), M),
    case("norm of zeros", lambda x: (0 * x).norm(0, 1) + x.sum(1), M),
    case("norm", lambda x: (x.norm(), x.norm(1, 0), x.norm(3, 1), x.norm(float("inf"), 1)), M),
    case("vector_norm", lambda x: (torch.linalg.vector_norm(x, 3, 1), torch.linalg.norm(x)), M),
    case("frobenius", lambda x: torch.norm(x, p=2, dim=(0, 1)) + torch.linalg.matrix_norm(x), M),
    case("dist", lambda x, y: torch.dist(x, y, 3), M, M),
    case("renorm", lambda x: torch.renorm(x, 2, 0, 0.5), M),
    case("logsumexp", lambda x: (x.logsumexp(1), x.logsumexp((0, 1), keepdim=True)), M),
    case("softmax", lambda x: (x.softmax(0), x.softmax(-1), x.log_softmax(-1)), M),
    case(
        "softmax in float32",
        lambda x: x.softmax(0, dtype=torch.float32).double(),
        M,
        tolerance=1e-5,
    ),
    case("max", lambda x: (x.max(), x.max(0), x.min(1, keepdim=True), x.min()), M),
    case("amax", lambda x: (x.amax(), x.amax((0, 1)), x.amin(1), x.aminmax(dim=0)), M),
    case("ties", lambda x: (x.relu().amax(1), x.relu().max(), x.relu().max(1)), M),
    case("median", lambda x: (x.median(), x.median(1), x.nanmedian(), x.nanmedian(0)), M),
    case("order", lambda x: (x.sort(1), x.topk(2, 1), x.kthvalue(2, 0), x.mode(1), x.msort()), M),
    case("quantile", lambda x: x.quantile(0.3, 1), M),
    case("cumulative", lambda x: (x.cumsum(1), x.cumprod(0), x.logcumsumexp(1)), M),
    case("cumulative extremes", lambda x: (x.cummax(1), x.cummin(0)), M),
    case("diff", lambda x: (x.diff(), torch.trapezoid(x), x.nansum(1), x.nanmean(0)), M),
    case("cov", lambda x: (x.cov(), x.corrcoef()), M),
]

MOVES = [
    case("views", lambda x: (x.view(2, 6), x.reshape(-1), x.t().reshape(6, 2), x.ravel()), M),
    case("dims", lambda x: (x.unsqueeze(1).squeeze(1), x[None, :, None].squeeze((0, 2)), x.mT), M),
    case(
        "transpose", lambda x: (x.transpose(0, -1), x.permute(2, 0, 1), x.swapaxes(1, 2)), (2, 3, 4)
    ),
    case("movedim", lambda x: (x.movedim(0, 2), x.flatten(1), x.unflatten(2, (2, 2))), (2, 3, 4)),
    case("expand", lambda x: (x.expand(2, 3, 4), x.broadcast_to(3, 4)), (3, 1)),
    case("repeat", lambda x: (x.repeat(2, 3), x.tile(2), x.repeat_interleave(2, 0)), M),
    case("select", lambda x: (x[1], x[:, -1], x.select(-1, -2), x[-1, 2]), M),
    case(
        "slice", lambda x: (x[1:], x[:, -3:-1], x[::2, 1:4:2], x[5:], x[-9:2], x.narrow(1, 1, 2)), M
    ),
    case("split", lambda x: (x.split(2), x.split([1, 3], 1), x.chunk(2, -1), x.unbind(1)), M),
    case("unsafe", lambda x: (x.unsafe_chunk(2), x.unsafe_split_with_sizes([1, 3], 1)), M),
    case("some of a split", lambda x: x.split(1)[1] + x.unbind(0)[2] * 2, M),
    case("cat", lambda x, y: (torch.cat([x, y, x]), torch.cat([y, torch.ones(1, 4)])), M, (2, 4)),
    case("stack", lambda x, y: (torch.stack([x, y, x], 1), torch.stack([x, x * 2], -1)), M, M),
    case("stacks", lambda x, y: (torch.hstack([x, y]), torch.block_diag(x, y)), M, M),
    case("index", lambda x: (x[ROWS], x[:, ROWS], x[MASK], x[ROWS, ROWS], x[ROWS.bool()]), M),
    case("complex numbers that move", _turned, M, M),
    case("view, filled", partial(_written, at=1), M),
    case("view, mask filled", partial(_written, at=MASK.t()), M),
    case("view, a row", partial(_written, at=1), M, (3,)),
    case("view, one row in many places", partial(_written, at=ROWS[:2]), M, (3,)),
    case("view, one number in many places", partial(_written, at=MASK.t()), M, ()),
    case("index with gaps", lambda x: (x[ROWS, :, ROWS], x[:, ROWS, None, ROWS]), (3, 3, 3)),
    case("index from the end", lambda x: (x[ROWS - 3], x[:, ROWS - 2], x[ROWS[:0]]), M),
    case("pick", lambda x: (x.index_select(1, ROWS), x.gather(1, LABELS), x.take(LABELS)), M),
    case("take_along_dim", lambda x: torch.take_along_dim(x, LABELS, 1), (2, 4)),
    case("masked_select", lambda x: x.masked_select(MASK), M),
    case("masked_scatter", lambda x, y: x.masked_scatter(MASK, y), M, M),
    case("scatter", lambda x, y: (x.scatter(0, LABELS, y), x.scatter_add(0, LABELS, y)), M, (2, 4)),
    case("scatter a number", lambda x: x.scatter(0, LABELS, 2.0), M),
    *[
        case(
            f"scatter_reduce {how}",
            lambda x, y, how=how: x.scatter_reduce(0, LABELS, y, how, include_self=True),
            M,
            (2, 4),
        )
        for how in ("sum", "mean", "prod", "amax", "amin")
    ],
    case("index_put", lambda x, y: x.index_put((ROWS,), y, accumulate=True), M, M),
    case("index_put last", lambda x, y: x.index_put((ROWS[:2],), y), M, (2, 4)),
    case("index_copy", lambda x, y: x.index_copy(0, ROWS[:2], y), M, (2, 4)),
    case("index_add", lambda x, y: x.index_add(0, ROWS, y, alpha=0.5), M, M),
    case("index_fill", lambda x, y: (x.index_fill(0, ROWS, 2.0), x.index_fill(0, ROWS, y)), M, ()),
    case("put", lambda x, y: x.put(ROWS[:2], y), M, (2,)),
    case(
        "select_scatter",
        lambda x, y: (x.select_scatter(y, 0, 1), x.slice_scatter(x[:2], 0, 1)),
        M,
        (4,),
    ),
    case("diagonal_scatter", lambda x, y: x.diagonal_scatter(y), (3, 3), (3,)),
    case(
        "roll",
        lambda x: (x.roll(1, 0), x.roll((1, 2), (0, 1)), x.roll(2), x.flip(0), x.fliplr()),
        M,
    ),
    case("rot90", lambda x: (x.rot90(), x.rot90(2)), M),
    case("triangles", lambda x: (x.tril(), x.triu(1), x.tril(-1)), M),
    case("diagonals", lambda x: (x.diag(), x.diagonal(1), x.trace(), x[0].diag_embed()), (3, 3)),
    case("unfold", lambda x: x.unfold(1, 2, 1), M),
    case(
        "as_strided",
        lambda x: (x.as_strided((2, 3), (3, 1), 1), x.clone().as_strided((3,), (1,))),
        M,
    ),
    case("pad", lambda x: (torch.nn.functional.pad(x, (1, -1, 0, 2), value=3.0),), M),
    case("contiguous", lambda x: (x.t().contiguous(), x.clone(), x.detach() + x), M),
    case(
        "combinations",
        lambda x, y: (torch.cartesian_prod(x, y), torch.meshgrid(x, y, indexing="ij")),
        (2,),
        (3,),
    ),
    case("alias", lambda x: torch.ops.aten.alias(x.exp()), M),
    case("cat with nothing", lambda x: torch.cat([x.flatten()[:0], x], 1), M),
    case("empty", lambda x: (x[:0].sum(0), x[:0] @ x.mT, torch.cat([x, x[:0]])), M),
    case("empty batch", lambda x, w: torch.addmm(w[0, :2], x, w[:, :2]).relu(), (0, 4), (4, 3)),
]

PRODUCTS = [
    case("mm", lambda x, y: (x @ y, torch.mm(x, y)), M, (4, 2)),
    case("bmm", torch.bmm, (2, 3, 4), (2, 4, 2)),
    case("matmul", torch.matmul, (5, 2, 3, 4), (2, 4, 2)),
    case(
        "vectors",
        lambda x, y: (x @ y, x[0] @ y, y.dot(y), x[0].vdot(y), torch.outer(x[0], y)),
        M,
        (4,),
    ),
    case(
        "inner",
        lambda x, y: (torch.inner(x, y), torch.tensordot(x, y, ([1], [1])), torch.kron(x, y)),
        M,
        (2, 4),
    ),
    case("addmm", lambda b, x, y: torch.addmm(b, x, y, alpha=0.3, beta=-2.0), (2,), M, (4, 2)),
    case("addmm plain", torch.addmm, (3, 2), M, (4, 2)),
    case("addmm to a column", torch.addmm, (3, 1), M, (4, 2)),
    case(
        "baddbmm",
        lambda b, x, y: torch.baddbmm(b, x, y, alpha=0.3, beta=2.0),
        (3, 1),
        (2, 3, 4),
        (2, 4, 2),
    ),
    case("addbmm", torch.addbmm, (3, 2), (2, 3, 4), (2, 4, 2)),
    case("addmv", lambda b, x, y: torch.addmv(b, x, y, alpha=0.3, beta=2.0), (3,), M, (4,)),
    case("addr", torch.addr, M, (3,), (4,)),
    case("einsum", lambda x, y: torch.einsum("bij,bjk->ki", x, y), (2, 3, 4), (2, 4, 2)),
    case("einsum 3", lambda x, y, z: torch.einsum("bi,ij,bj->b", x, y, z), M, (4, 2), (3, 2)),
    case("multi_dot", lambda x, y, z: torch.linalg.multi_dot([x, y, z]), M, (4, 2), (2, 3)),
    case("linear", torch.nn.functional.linear, (2, 3, 4), (2, 4), (2,)),
    case("bilinear", torch.nn.functional.bilinear, M, (3, 2), (2, 4, 2), (2,)),
    case("cdist", torch.cdist, M, (2, 4)),
    case("cdist 1", lambda x, y: torch.cdist(x, y, 1.0), (2, 3, 4), (2, 2, 4)),
    case("cdist 3", lambda x, y: torch.cdist(x, y, 3.0), M, (2, 4)),
    case("cdist inf", lambda x, y: torch.cdist(x, y, float("inf")), M, (2, 4)),
    case(
        "cdist by products",
        lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"),
        M,
        (2, 4),
        tolerance=1e-7,
    ),
    case("pdist", torch.nn.functional.pdist, M),
    case("similarity", torch.nn.functional.cosine_similarity, M, M),
    case("distance", torch.nn.functional.pairwise_distance, M, M),
    case("normalize", lambda x: torch.nn.functional.normalize(x, dim=1), M),
]

FUNCTIONS = [*ELEMENTWISE, *REDUCTIONS, *MOVES, *PRODUCTS]
