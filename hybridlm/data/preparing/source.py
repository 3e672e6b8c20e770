"""A corpus to be prepared, and what of it is held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hybridlm.config.data import CorpusConfig
from hybridlm.data.preparing.split import Split, find_split
from hybridlm.data.reading.units import Corpus


@dataclass(frozen=True)
class Source:
    """A corpus to be prepared: the only one, or a part of a mixture. weight: of its text in what a BPE is trained
    on."""

    name: str
    weight: float
    config: CorpusConfig
    corpus: Corpus
    val_fraction: float

    @cached_property
    def split(self) -> Split:
        """What is held out; asking may read the corpus."""
        return find_split(self.corpus, self.val_fraction)

    @property
    def split_facts(self) -> list[object]:
        """What the split hangs on besides the corpus."""
        return ["named", self.corpus.named] if self.corpus.named is not None else ["hash", self.val_fraction]
