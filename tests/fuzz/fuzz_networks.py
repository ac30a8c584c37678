"""Loops with several networks, attacked inputs, and several passes that make one batch.

Only the wrapped model's parameters have weighted gradients; inputs and other networks have plain
ones.
"""

from __future__ import annotations

import copy

import torch
from fuzz_loops import Pattern, loop, trial
from fuzz_nets import STEADY, WIDTH
from fuzz_trials import Draw, Trial
from torch import nn
from torch.func import functional_call

NETWORKS: dict[str, Pattern] = {}
ACCUMULATED: dict[str, Pattern] = {}
STEPS: dict[str, Pattern] = {}


@loop("a network before or after", NETWORKS)
def around(draw):
    how = draw.pick("before", "after", "both", "before, model frozen", "only after", "beside")
    freeze = draw.pick(None, None, "a.weight", "trunk")

    def run(user, batch):
        world, net = user.world, user.net
        if freeze is not None:
            for name, p in net.named_parameters():
                p.requires_grad_(p.requires_grad and not name.startswith(freeze))
        if how == "before, model frozen":
            net.requires_grad_(False)
        x = world.before(batch.x) if how.startswith(("before", "both")) else batch.x
        out = net(x)
        if how == "only after":
            out = out.detach()
        if how in ("after", "both", "only after"):
            out = world.after(out)
        if how == "beside":
            out = out + world.teacher(batch.x)
        loss = user.criterion(out, batch.y)
        user.note("value", loss)
        user.backward(loss)

    return run, f"{how}, frozen {freeze}"


@loop("adversary", NETWORKS)
def adversary(draw):
    """The wrapped model judges what another makes."""
    detach = draw.flag()
    generator_first = draw.flag()
    frozen = draw.pick(False, False, True)

    def run(user, batch):
        world, net = user.world, user.net

        def judge():
            made = world.before(batch.more[0].x)
            made = made.detach() if detach else made
            loss = user.criterion(net(batch.x), batch.y)
            user.backward(loss + user.criterion(net(made), batch.more[0].y))

        def generate():
            net.requires_grad_(not frozen)
            loss = user.criterion(net(world.before(batch.more[1].x)), batch.more[1].y)
            user.note("value", loss)
            user.backward(loss)
            net.requires_grad_(True)

        if generator_first:
            generate()
            user.zero_grad()
        judge()
        if not generator_first:
            keep = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            generate()
            for p, g in zip(net.parameters(), keep, strict=True):
                p.grad = g

    return run, f"detached {detach}, generator first {generator_first}, frozen {frozen}"


@loop("only another network", NETWORKS)
def another(draw):
    first = draw.flag()

    def run(user, batch):
        other = batch.more[0]
        loss = user.criterion(user.world.teacher(other.x), other.y)
        user.note("value", loss)
        if first:
            user.backward(loss)
            user.backward(user.criterion(user.net(batch.x), batch.y))
        else:
            user.backward(user.criterion(user.net(batch.x), batch.y) + 0.5 * loss)

    return run, f"first {first}"


@loop("a copy of the model", NETWORKS)
def copied(draw):
    how = draw.pick("teacher", "trained copy", "functional call", "adapted")

    def run(user, batch):
        net = user.net
        if how == "teacher":
            with torch.no_grad():
                wanted = copy.deepcopy(net)(batch.x).argmax(1)
            return user.backward(user.criterion(net(batch.x), wanted))
        if how == "trained copy":
            twin = copy.deepcopy(net)
            for p in twin.parameters():
                p.grad = None
            user.backward(user.criterion(twin(batch.x), batch.y))
            user.note_gradients(twin)
            return user.backward(user.criterion(net(batch.x), batch.y))
        moved = {name: p * 1.1 for name, p in net.named_parameters()}
        if how == "adapted":
            loss = nn.functional.cross_entropy(net(batch.more[0].x), batch.more[0].y)
            trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
            steps = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
            moved = {
                n: p if g is None else p - 0.1 * g
                for (n, p), g in zip(trainable.items(), steps, strict=True)
            }
        return user.backward(user.criterion(functional_call(net, moved, (batch.x,)), batch.y))

    return run, how


@loop("attacked inputs", NETWORKS)
def attacked(draw):
    how = draw.pick("grad", "backward", "twice", "grad of both", "saliency", "in eval")

    def run(user, batch):
        net = user.net
        x = batch.x.clone().requires_grad_()
        if how == "saliency":
            user.backward(user.criterion(net(x), batch.y))
            return user.note("d x", x.grad)
        if how == "in eval":
            net.eval()
        loss = user.criterion(net(x), batch.y)
        if how == "in eval":
            net.train()
        if how == "grad of both":
            weight = net.a.weight
            slope, d_weight = torch.autograd.grad(loss, [x, weight])
            user.note("d x", slope)
            weight.grad = d_weight
            return None
        if how == "backward":
            user.backward(loss)
            slope = x.grad.clone()
            user.zero_grad()
        else:
            (slope,) = torch.autograd.grad(loss, x)
        user.note("d x", slope)
        moved = batch.x + slope
        if how == "twice":
            moved.requires_grad_()
            (slope,) = torch.autograd.grad(user.criterion(net(moved), batch.y), moved)
            user.note("d x", slope)
            moved = moved.detach() + slope
        return user.backward(user.criterion(net(moved), batch.y))

    return run, how


# One batch in several passes ----------------------------------------------------------------------


@loop("accumulated", ACCUMULATED)
def accumulated(draw):
    how = draw.pick(
        "one loss", "two losses", "two losses of two forwards", "half", "a term", "mixed"
    )
    passes = draw.pick(2, 2, 3)
    factor = draw.pick(1.0, 0.4)
    all_of_them = draw.flag(0.8)

    def run(user, batch):
        every = (batch, *batch.more)[:passes]
        for part in every if all_of_them else every[:-1]:
            h = user.net.trunk(part.x)
            loss = user.criterion(user.net.a(h), part.y)
            if how.startswith("two losses"):
                h = user.net.trunk(part.x) if how.endswith("forwards") else h
                loss = loss + factor * user.criterion(user.net.b(h), part.z)
            elif how == "half":
                loss = factor * loss
            elif how == "a term":
                loss = loss + 0.1 * sum(p.square().sum() for p in user.net.parameters())
            elif how == "mixed" and part is batch:
                loss = loss + user.criterion(user.net.a(h[:1]), part.z[:1])
            user.backward(loss)
        if not all_of_them:
            user.finish()

    run.passes = passes
    return run, f"{how}, {passes} passes, factor {factor}, complete {all_of_them}"


# Time steps ---------------------------------------------------------------------------------------


@loop("time steps", STEPS)
def time_steps(draw):
    T = draw.pick(1, 2, 3, 5)
    how = draw.pick("sum", "mean", "state detached", "backward each", "lengths", "two heads")

    def run(user, batch):
        h = torch.zeros(len(batch.x), WIDTH, dtype=batch.x.dtype)
        total = 0.0
        for t in range(T):
            h = user.net.trunk(batch.x * (t + 1) / T + h).tanh()
            out, y = user.net.a(h), (batch.y + t) % 3
            if how == "lengths":
                out, y = out[: max(1, len(out) - t)], y[: max(1, len(y) - t)]
            loss = user.criterion(out, y)
            if how == "two heads":
                loss = loss + 0.5 * user.criterion(user.net.b(h), batch.z)
            if how == "backward each":
                user.backward(loss, retain_graph=True)
                continue
            total = total + (loss / T if how == "mean" else loss)
            h = h.detach() if how == "state detached" else h
        if how != "backward each":
            user.note("value", total)
            user.backward(total)

    return run, f"{how}, T = {T}"


def several_networks(draw: Draw, name: str) -> Trial:
    return trial(draw, NETWORKS[name])


def one_batch(draw: Draw, name: str) -> Trial:
    made = trial(draw, ACCUMULATED[name])
    made.options["accumulation_steps"] = made.loop.passes
    return made


def over_time(draw: Draw, name: str) -> Trial:
    return trial(draw, STEPS[name], STEADY)
