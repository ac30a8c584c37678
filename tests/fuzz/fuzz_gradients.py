"""What loops do with gradients: take, save, write, clip, clear, freeze, hook, and add to them."""

from __future__ import annotations

import torch
from fuzz_loops import Pattern, loop, trial
from fuzz_nets import STEADY, TRUNKS
from fuzz_trials import Draw, Trial
from torch import nn

GRADIENTS: dict[str, Pattern] = {}


@loop("gradients taken and written", GRADIENTS)
def taken(draw):
    how = draw.pick(
        "grad of all", "grad of some", "inputs=", "saved", "surgery", "added", "clipped"
    )

    def run(user, batch):
        parameters = [p for p in user.net.parameters() if p.requires_grad]
        loss = user.criterion(user.net(batch.x), batch.y)
        if how.startswith("grad"):
            chosen = parameters if how == "grad of all" else parameters[:1]
            gradients = torch.autograd.grad(loss, chosen, allow_unused=True)
            for p, g in zip(chosen, gradients, strict=True):
                p.grad = g
            return None
        if how == "inputs=":
            return user.backward(loss, inputs=parameters[:2])
        user.backward(loss)
        if how == "clipped":
            return nn.utils.clip_grad_norm_(parameters, 0.1)
        saved = [None if p.grad is None else p.grad.clone() for p in parameters]
        user.zero_grad()
        if how in ("surgery", "added"):
            user.backward(user.criterion(user.net(batch.more[0].x), batch.more[0].y))
        for p, g in zip(parameters, saved, strict=True):
            if g is None:
                continue
            if how == "added":
                p.grad += g
            elif how == "surgery":
                p.grad = g - 0.5 * (g * p.grad).sum() * p.grad
            else:
                p.grad = g
        return None

    return run, how


@loop("terms added", GRADIENTS)
def terms(draw):
    how = draw.pick(
        "weights",
        "outputs",
        "hidden",
        "entropy",
        "another batch",
        "constant",
        "slope",
        "alone first",
    )

    def run(user, batch):
        x = batch.x.requires_grad_() if how == "slope" else batch.x
        h = user.net.trunk(x)
        out = user.net.a(h)
        loss = user.criterion(out, batch.y)
        if how == "alone first":
            user.backward(out.square().mean(), retain_graph=True)
            return user.backward(loss)
        if how == "slope":
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            term = slope.square().mean()
        else:
            term = {
                "weights": lambda: sum(p.square().sum() for p in user.net.parameters()),
                "outputs": lambda: out.square().mean(),
                "hidden": lambda: h.abs().mean() + user.net.b(h).mean(),
                "entropy": lambda: -(out.softmax(1) * out.log_softmax(1)).sum(),
                "another batch": lambda: user.net(batch.more[0].x).square().mean(),
                "constant": lambda: 3.0,
            }[how]()
        return user.backward(loss + 0.1 * term)

    return run, how


@loop("zero_grad in odd places", GRADIENTS)
def zeroed(draw):
    who = draw.pick("optimizer", "model", "not to None", "by hand")
    when = draw.pick("before the criterion", "before backward", "after a pass", "after a lost pass")

    def clear(user):
        if who == "optimizer":
            user.zero_grad()
        elif who == "not to None":
            user.zero_grad(set_to_none=False)
        elif who == "model":
            user.net.zero_grad()
        else:
            for p in user.net.parameters():
                if p.grad is not None:
                    p.grad.zero_()

    def run(user, batch):
        if when.startswith("after"):
            user.backward(user.criterion(user.net(batch.more[0].x), batch.more[0].y))
            if when == "after a lost pass":
                clear(user)
        out = user.net(batch.x)
        if when == "before the criterion":
            clear(user)
        loss = user.criterion(out, batch.y)
        if when == "before backward":
            clear(user)
        user.backward(loss)

    return run, f"{who}, {when}"


@loop("frozen in turn", GRADIENTS)
def frozen(draw):
    states = [draw.pick("nothing", "trunk", "a", "bias", "weight") for _ in range(4)]
    between = draw.flag()

    def run(user, batch):
        steps = iter(states)

        def freeze():
            state = next(steps)
            for name, p in user.net.named_parameters():
                p.requires_grad_(not (name.startswith(state) or name.endswith(state)))

        freeze()
        if between:
            user.backward(user.criterion(user.net(batch.more[0].x), batch.more[0].y))
            user.zero_grad()
            user.net.zero_grad()
            freeze()
        user.backward(user.criterion(user.net(batch.x), batch.y))

    return run, f"{states}, between {between}"


@loop("hooks", GRADIENTS)
def hooked(draw):
    where = draw.pick("parameter", "after accumulation", "module", "activation", "forward")
    factor, begins = draw.pick(1.0, 0.5), draw.pick(0, 0, 2)
    if where == "activation":
        begins = 0  # one that begins later is looked for at some steps only
    steps: dict[int, int] = {}

    def run(user, batch):
        calls: list[float] = []
        number = steps[id(user)] = steps.get(id(user), -1) + 1
        if number < begins:
            return user.backward(user.criterion(user.net(batch.x), batch.y))

        def heard(gradient):
            """Counts, and scales; the oracle's own passes are not heard."""
            if user.measuring:
                return gradient * factor if where == "activation" else gradient
            calls.append(1.0)
            return gradient * factor

        def count(gradient):
            heard(gradient)

        handles = []
        weight, head = user.net.a.weight, user.net.a
        if where == "parameter":
            handles.append(weight.register_hook(heard))
        elif where == "after accumulation":
            handles.append(weight.register_post_accumulate_grad_hook(lambda p: count(p.grad)))
        elif where == "module":
            handles.append(head.register_full_backward_hook(lambda m, i, o: count(o[0])))
        elif where == "forward":
            handles.append(head.register_forward_hook(lambda m, i, o: o * factor))
        h = user.net.trunk(batch.x)
        if where == "activation":
            h.register_hook(heard)
        user.backward(user.criterion(head(h), batch.y))
        if where != "activation" or factor == 1.0:  # one that changes it is asked for each product
            user.note("calls", float(len(calls)))
        for handle in handles:
            handle.remove()
        return None

    return run, f"{where}, factor {factor}, from {begins}"


def with_gradients(draw: Draw, name: str) -> Trial:
    return trial(draw, GRADIENTS[name], STEADY if name == "hooks" else tuple(TRUNKS))
