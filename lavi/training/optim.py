"""Which parts of a model train, at which rate; and Muon for hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lavi.errors import UserError, nearest

LEAST_RATE = 0.01
"""Share of the peak rate that is left at the end."""


def adamw(groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW with the second moment that language models of every size are trained with."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def rate_at_step(step: int, total: int, *, warmup: float) -> float:
    """Share of the peak rate in step ``step`` (from 0) of ``total``: it rises over a share ``warmup``, then falls."""
    rise = max(1, round(warmup * total))
    return (step + 1) / rise if step < rise else _falling((step - rise) / max(1, total - rise))


def rate_at_share(passed: float, *, warmup: float) -> float:
    """The same where a share ``passed`` of the run's time is over."""
    if passed < warmup:
        return max(LEAST_RATE, passed / warmup)
    return _falling((passed - warmup) / max(1e-9, 1 - warmup))


def _falling(done: float) -> float:
    """Along a cosine from 1 to :data:`LEAST_RATE`, of whose length a share ``done`` is over."""
    return LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def orthogonalised(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """The nearest matrix to (rows, columns) ``matrix`` whose singular values are all about 1 (between 0.7 and 1.2).

    By the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024), whose coefficients lift small singular values
    fast. In bfloat16 on an accelerator, which is enough and quickest there; in float32 on a CPU, most of which only
    emulate bfloat16: there torch's own Muon took twice the time of everything else in a training step.
    """
    linear, cubic, quintic = 3.4445, -4.7750, 2.0315
    wide = matrix.size(0) <= matrix.size(1)
    x = (matrix if wide else matrix.T).to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    x = x / (x.norm() + 1e-7)  # no singular value above 1, from where the iteration converges
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum as the step of a matrix (Jordan et al., 2024), of the size AdamW's steps have.

    The same steps as ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, but for :func:`orthogonalised`'s precision.

    Args:
        groups: parameter groups of matrices, with ``params``, ``lr`` and ``weight_decay``.
        momentum: share of the running mean of gradients in its next value, of Nesterov's kind.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float = 0.95) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state, momentum = self.state[matrix], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                step = orthogonalised(matrix.grad.lerp(mean, momentum))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                # the entries of an orthogonal (a, b) have the mean square 1 / max(a, b); AdamW's have about 0.2 ** 2
                matrix.add_(step.to(matrix.dtype), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


class MuonAdamW(torch.optim.Optimizer):
    """Steps each parameter group by its ``kind``: ``muon`` or ``adamw``.

    Trainers and schedules take one optimizer; Muon is for the matrices of hidden layers only.

    Args:
        groups: parameter groups with ``params``, ``lr``, ``weight_decay`` and ``kind``.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state: schedules and checkpoints know only this one."""
        groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for group in self.param_groups:
            groups[group["kind"]].append(group)
        self.parts: list[torch.optim.Optimizer] = []
        if groups["muon"]:
            self.parts.append(Muon(groups["muon"]))
        if groups["adamw"]:
            self.parts.append(adamw(groups["adamw"]))
        for part in self.parts:
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # loading a checkpoint makes new groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def hidden_matrices(part: nn.Module) -> set[int]:
    """Ids of the parameters that Muon is for: weights of linear layers, but not those that give logits.

    A head is known by its weight being an embedding's (tied), or by a transformers model naming it.
    """
    heads = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
    for module in part.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        if head is not None:
            heads.add(id(head.weight))
    return {id(m.weight) for m in part.modules() if isinstance(m, nn.Linear)} - heads


def part_of_each(model: nn.Module, rates: Mapping[str, float | None], adapters: Collection[str] = ()) -> dict[str, str]:
    """The part of ``rates`` that each parameter trains with, by the parameter's name; what is not in it is frozen.

    A part is a dotted name in the model: a submodule, or a parameter. The most specific one wins; at None it is frozen.
    A shared parameter (tied embeddings) belongs to parts by any of its names. Where a part holds ``adapters``, it
    trains these alone: the weights they adapt are frozen.

    Raises:
        UserError: nothing has that name, two parts name one shared parameter, or nothing trains.
    """
    every = every_name(model)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} - {""}
    known |= {name for names, _ in every for name in names}
    for part in rates:
        if part not in known:
            raise UserError(f"module.learning_rate names '{part}': {_nearest_part(part, known)}")
    adapting = {part for part in rates for name in adapters if inside(name, part)}
    part_of = {}
    for names, _ in every:
        name, chosen = names[0], _most_specific(names, rates)
        if chosen and rates[chosen] is not None and (chosen not in adapting or name in adapters):
            part_of[name] = chosen
    if not part_of:
        raise UserError(f"module.learning_rate ({dict(rates)}) names nothing that has parameters to train.")
    return part_of


def every_name(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names; the first is that of ``named_parameters``."""
    names: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(names.values())


def inside(name: str, part: str) -> bool:
    """Whether a dotted name is ``part`` or something inside it."""
    return f"{name}.".startswith(f"{part}.")


def _most_specific(names: Sequence[str], rates: Mapping[str, float | None]) -> str | None:
    """The longest part that any of a parameter's names lies in."""
    fitting = [part for part in rates if any(inside(name, part) for name in names)]
    if not fitting:
        return None
    chosen = max(fitting, key=lambda part: part.count("."))
    for part in fitting:
        if not inside(chosen, part) and rates[part] != rates[chosen]:
            raise UserError(
                f"module.learning_rate names '{part}' and '{chosen}', which share {names[0]} (tied weights): name one "
                "of them."
            )
    return chosen


def _nearest_part(name: str, known: Collection[str]) -> str:
    """The nearest name beside the first wrong one on the way down."""
    wrong = next(short for short in _ways_down(name) if short not in known)
    parent = wrong.rpartition(".")[0]
    return nearest(wrong, {other for other in known if other.rpartition(".")[0] == parent})


def _ways_down(name: str) -> list[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    words = name.split(".")
    return [".".join(words[: count + 1]) for count in range(len(words))]


def parameter_groups(
    model: nn.Module,
    part_of: Mapping[str, str],
    rates: Mapping[str, float | None],
    *,
    weight_decay: float = 0.0,
    muon: float | None = None,
) -> list[dict[str, Any]]:
    """The groups of each part that trains: what Muon trains, other matrices, vectors (which never decay).

    Args:
        part_of: from :func:`part_of_each`.
        muon: train hidden matrices with Muon, at this many times the rate; None: with AdamW.
    """
    hidden = set() if muon is None else hidden_matrices(model)
    members: dict[tuple[str, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in part_of:
            kind = "muon" if id(parameter) in hidden else "matrices" if parameter.ndim > 1 else "vectors"
            members.setdefault((part_of[name], kind), []).append(parameter)
    groups = []
    for part, rate in rates.items():
        for kind in ("muon", "matrices", "vectors"):
            if (part, kind) in members:
                assert rate is not None
                groups.append(
                    {
                        "params": members[part, kind],
                        "lr": rate * (muon or 1.0) if kind == "muon" else rate,
                        "weight_decay": 0.0 if kind == "vectors" else weight_decay,
                        "kind": "muon" if kind == "muon" else "adamw",
                        "name": f"{part}/{kind}",
                    }
                )
    return groups
