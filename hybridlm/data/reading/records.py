"""How the records of a corpus become documents, by ``data.format``."""

from __future__ import annotations

from hybridlm.config.data import CorpusConfig
from hybridlm.data.reading.conversations import ChatRecords
from hybridlm.data.reading.documents import Records, TextRecords
from hybridlm.data.reading.preferences import PreferenceRecords


def records_of(config: CorpusConfig) -> Records:
    """Those of ``config.format``."""
    match config.format:
        case "chat":
            return ChatRecords()
        case "preferences":
            return PreferenceRecords()
        case "text":
            return TextRecords(config.text_field)
