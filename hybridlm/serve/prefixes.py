"""The states after what prompts have in common, kept so that it is read once: system prompts, earlier turns.

A tree whose nodes are stretches of tokens. A node keeps what its tokens left in the caches: the columns of attention,
so that a path from the root holds every column once, and the whole state of the other layers, whose size does not
depend on the length of the text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from hybridlm.model.cache import ModelCache

_TOKEN_BYTES = 40  # of a token in a tuple, roughly


class Node:
    """The state after ``tokens`` tokens: those of its parent and ``own``. logits: (1, V) of the next token, where
    known. exact: its tokens were read in one piece, without other rows, after an exact state: whoever does that gets
    the same bits. piece: None: evicted, or the root."""

    def __init__(
        self,
        parent: Node | None,
        own: tuple[int, ...],
        piece: list[dict[str, Tensor]] | None,
        logits: Tensor | None,
        exact: bool,
    ) -> None:
        self.parent, self.own, self.piece, self.logits, self.exact = parent, own, piece, logits, exact
        self.children: dict[tuple[int, ...], Node] = {}
        self.tokens: int = len(own) if parent is None else parent.tokens + len(own)

    @property
    def bytes(self) -> int:
        tensors = [tensor for layer in self.piece or () for tensor in layer.values()]
        tensors += [] if self.logits is None else [self.logits]
        return sum(tensor.nbytes for tensor in tensors) + _TOKEN_BYTES * len(self.own)

    def path(self) -> list[Node]:
        """From the first stretch of tokens to this one."""
        nodes, node = list[Node](), self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Prefixes:
    """At most ``limit`` bytes of states; those not used for the longest time go first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.root = Node(None, (), None, None, exact=True)
        # Least recently used first. A node is used with everything above it, which counts as used after it: so the
        # first one has no children.
        self._used: OrderedDict[Node, None] = OrderedDict()

    def longest(self, ids: Sequence[int]) -> Node:
        """The node after most of the first tokens of ``ids``, at least one of which is left to read unless the node
        knows the logits; the root where there is none."""
        known, found, below = tuple(ids), self.root, [self.root]
        while below:
            node = below.pop()
            if node.tokens > found.tokens and (node.tokens < len(known) or node.logits is not None):
                found = node
            for length in {len(own) for own in node.children}:
                child = node.children.get(known[node.tokens : node.tokens + length])
                below += [] if child is None else [child]
        self._touch(found)
        return found

    def exact(self, ids: Sequence[int], cuts: Sequence[int]) -> Node:
        """The last exact node after pieces of ``ids`` that end at ``cuts``, in their order."""
        node = self.root
        for cut in cuts:
            child = node.children.get(tuple(ids[node.tokens : cut]))
            if child is None or not child.exact or (cut == len(ids) and child.logits is None):
                break
            node = child
        self._touch(node)
        return node

    def add(self, node: Node, ids: Sequence[int], cache: ModelCache, logits: Tensor | None, exact: bool) -> Node:
        """Keeps the state of ``cache``, of one row, after ``ids``, which begin with the tokens of ``node``. The node of
        that state, or the nearest above it where it does not fit in the limit. exact: if ``node`` is."""
        while node.parent is not None and node.piece is None:  # evicted meanwhile
            node, exact = node.parent, False
        own = tuple(ids[node.tokens :])
        if not own or not self.limit:
            return node
        child = node.children.get(own)
        if child is None or (exact and node.exact and not child.exact):
            logits = None if logits is None else logits.clone()
            new = Node(node, own, cache.piece(node.tokens), logits, exact and node.exact)
            if new.bytes > self.limit:
                return node
            if child is None:
                child = node.children[own] = new
            else:  # what is below it stays what it is
                self.bytes -= child.bytes
                child.piece, child.logits, child.exact = new.piece, new.logits, True
            self.bytes += child.bytes
        self._touch(child)
        self._evict()
        return child

    def _touch(self, node: Node) -> None:
        for used in reversed(node.path()):
            self._used[used] = None
            self._used.move_to_end(used)

    def _evict(self) -> None:
        while self.bytes > self.limit:
            oldest, _ = self._used.popitem(last=False)
            assert oldest.parent is not None
            self.bytes -= oldest.bytes
            del oldest.parent.children[oldest.own]
            oldest.piece = oldest.logits = None


def restore(node: Node, cache: ModelCache) -> None:
    """Brings ``cache``, new, of one row and with room for them, to the state after the tokens of ``node``."""
    pieces = [each.piece for each in node.path()]
    cache.fill([piece for piece in pieces if piece is not None], node.tokens)
