"""How tensors of a model of ours and of an architecture elsewhere correspond, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.errors import UserError, printable

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Link:
    """``theirs = give(ours)`` and ``ours = take(theirs)``, tensors in the order of the names. ``take`` raises
    ValueError where theirs hold something that ours cannot."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    give: Callable[[Tensors], Tensors]
    take: Callable[[Tensors], Tensors]


def same(ours: str, theirs: str) -> Link:
    """One tensor under two names."""
    return Link((ours,), (theirs,), list, list)


def joined(ours: Sequence[str], theirs: str, *, dim: int = 0) -> Link:
    """Theirs is ours, all of one size, side by side along ``dim``."""

    def take(tensors: Tensors) -> Tensors:
        return [part.contiguous() for part in tensors[0].chunk(len(ours), dim)]

    return Link(tuple(ours), (theirs,), lambda tensors: [torch.cat(list(tensors), dim)], take)


def split(ours: Sequence[str], theirs: str, sizes: Sequence[int]) -> Link:
    """Theirs is ours, of these many rows each, one below the other."""

    def take(tensors: Tensors) -> Tensors:
        return [part.contiguous() for part in tensors[0].split_with_sizes(list(sizes))]

    return Link(tuple(ours), (theirs,), lambda tensors: [torch.cat(list(tensors))], take)


def copied(ours: str, theirs: Sequence[str]) -> Link:
    """Each of theirs is a copy of ours."""

    def take(tensors: Tensors) -> Tensors:
        if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            raise ValueError(f"{' and '.join(theirs)} differ")
        return tensors[:1]

    return Link((ours,), tuple(theirs), lambda tensors: [tensors[0].clone() for _ in theirs], take)


def stacked(ours: str, theirs: Sequence[str]) -> Link:
    """Theirs are the slices of ours along its first axis."""
    return Link((ours,), tuple(theirs), lambda tensors: list(tensors[0]), lambda tensors: [torch.stack(list(tensors))])


def changed(ours: str, theirs: str, give: Callable[[Tensor], Tensor], take: Callable[[Tensor], Tensor]) -> Link:
    """One tensor each, by two functions that are each other's inverse."""
    return Link((ours,), (theirs,), lambda tensors: [give(tensors[0])], lambda tensors: [take(tensors[0])])


def constant(theirs: str, value: Callable[[], Tensor], meaning: str) -> Link:
    """A tensor that ours have no counterpart of. meaning: what another value would do, for the message."""

    def take(tensors: Tensors) -> Tensors:
        if not torch.equal(tensors[0].float(), value().float()):
            raise ValueError(f"{theirs}: {meaning}")
        return []

    return Link((), (theirs,), lambda tensors: [value()], take)


def exported(links: Iterable[Link], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, contiguous. RuntimeError: a tensor of ours has no link: it would be lost."""
    theirs: dict[str, Tensor] = {}
    used: set[str] = set()
    for link in links:
        given = link.give([weights[name] for name in link.ours])
        theirs |= {name: tensor.contiguous() for name, tensor in zip(link.theirs, given, strict=True)}
        used |= set(link.ours)
    if lost := sorted(weights.keys() - used):
        raise RuntimeError(f"tensors without a place in the exported model: {lost}")
    return theirs


def imported(links: Iterable[Link], theirs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our tensors. where: the folder, for messages. UserError: theirs lack one, have another, or hold what ours
    cannot."""
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for link in links:
        if missing := [name for name in link.theirs if name not in theirs]:
            raise UserError(f"{where}: it lacks {missing[0]}")
        try:
            taken = link.take([theirs[name] for name in link.theirs])
        except (ValueError, RuntimeError, IndexError) as error:  # of misshapen tensors
            raise UserError(f"{where}: {(str(error).splitlines() or ['misshapen'])[0][:200]}") from None
        ours |= dict(zip(link.ours, taken, strict=True))
        used |= set(link.theirs)
    if unknown := sorted(theirs.keys() - used):
        raise UserError(f"{where}: {printable(unknown[0][:100])} has no counterpart here")
    return ours
