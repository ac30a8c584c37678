"""Models that change while they train; losses, forwards and gradients of another make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fuzz_loops import Pattern, loop, trial
from fuzz_nets import CLASSES, STEADY
from fuzz_trials import Draw, Trial
from torch.nn.utils import parametrizations, prune

CHANGES: dict[str, Pattern] = {}


class Reversal(torch.autograd.Function):
    """Domain adaptation's: the gradient of the trunk is turned round."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, h):
        return (h * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@loop("changed in mid-training", CHANGES)
def changed(draw):
    how = draw.pick("weight norm", "spectral norm", "pruned", "tied", "rescaled", "moved", "cast")
    when = draw.pick(0, 1, 2)
    count = {}

    def run(user, batch):
        net, number = user.net, count.setdefault(id(user), 0)
        count[id(user)] += 1
        if number == when:
            if how == "weight norm":
                parametrizations.weight_norm(net.a)
            elif how == "spectral norm":
                parametrizations.spectral_norm(net.a)
            elif how == "pruned":
                prune.random_unstructured(net.a, "weight", 0.3)
            elif how == "tied":
                net.b.weight = net.a.weight
            elif how == "rescaled":
                with torch.no_grad():
                    net.a.weight.mul_(0.5)
            elif how == "moved":
                for p in net.parameters():
                    p.data = p.data.clone()
            else:
                net.float().double()
        h = net.trunk(batch.x)
        out = net.a(h) + net.b(h) if how == "tied" else net.a(h)
        user.backward(user.criterion(out, batch.y))

    return run, f"{how} at {when}"


@loop("losses of another make", CHANGES)
def losses(draw):
    how = draw.pick(
        "weighted", "halved", "some detached", "two forwards", "slopes", "maximum", "focal", "pairs"
    )

    def run(user, batch):
        net, y = user.net, batch.y
        x = batch.x.clone().requires_grad_() if how == "slopes" else batch.x
        out = net(x)
        each = F.cross_entropy(out, y, reduction="none")
        if how == "weighted":
            each = each * torch.linspace(0.5, 2, len(x)).to(each)
        elif how == "halved":
            each = each[::2]
        elif how == "some detached":
            each = torch.where(torch.arange(len(x)) % 3 > 0, each, each.detach())
        elif how == "two forwards":
            more = batch.more[0]
            each = torch.cat([each, F.cross_entropy(net(more.x), more.y, reduction="none")])
        elif how == "slopes":
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            each = (slope.sum(1) - out[:, 0]).square()
        elif how == "maximum":
            other = F.cross_entropy(net.b(net.trunk(x)), y, reduction="none")
            each = torch.maximum(each, other)
        elif how == "focal":
            each = (1 - (-each).exp()).square() * each
        elif how == "pairs":
            each = (out - net(x.flip(1))).square().sum(1)
        user.of_each(each)

    return run, how


@loop("forwards of another make", CHANGES)
def forwards(draw):
    how = draw.pick("vmap", "row by row", "on the cpu", "chunks", "anomaly", "hooked")

    def run(user, batch):
        net, x = user.net, batch.x
        if how == "vmap":
            out = torch.vmap(net, randomness="different")(x)
        elif how == "row by row":
            out = torch.stack([net(row[None])[0] for row in x])
        elif how == "chunks":
            out = torch.cat([net(part) for part in x.split(2)])
        elif how == "on the cpu":
            with torch.autograd.graph.save_on_cpu():
                out = net(x)
        elif how == "anomaly":
            with torch.autograd.set_detect_anomaly(True, check_nan=False):
                out = net(x)
        else:
            handle = net.trunk.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))
            out = net(x)
            handle.remove()
        user.backward(user.criterion(out, batch.y))

    return run, how


@loop("gradients of their own", CHANGES)
def own_gradients(draw):
    how = draw.pick("reversed", "rounded", "detached part", "penalty on slopes")

    def run(user, batch):
        net = user.net
        x = batch.x.clone().requires_grad_()
        h = net.trunk(x)
        if how == "reversed":
            loss = user.criterion(net.a(h), batch.y)
            loss = loss + user.criterion(net.b(Reversal.apply(h)), batch.z)
        elif how == "rounded":
            loss = user.criterion(net.a(Rounded.apply(h)), batch.y)
        elif how == "detached part":
            loss = user.criterion(net.a(torch.cat([h[:, :2], h[:, 2:].detach()], 1)), batch.y)
        else:
            out = net.a(h)
            (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            loss = user.criterion(out + slope[:, :CLASSES], batch.y)
        user.backward(loss)

    return run, how


def with_changes(draw: Draw, name: str) -> Trial:
    return trial(draw, CHANGES[name], STEADY)
