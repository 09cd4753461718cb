"""A document as it comes out of its source: its text, and what it is about where its record says so."""

from __future__ import annotations

from typing import Final, NamedTuple

TOPIC_FIELDS: Final = ("topic", "label", "category")
MAX_TOPIC_CHARS: Final = 60


class Document(NamedTuple):
    """The text of a document, and its topic in up to MAX_TOPIC_CHARS characters; empty where nobody tells it."""

    text: bytes
    topic: str = ""


def topic_of(record: object) -> str:
    """What a record of JSON says that it is about, in the first of TOPIC_FIELDS that is a string or a whole number."""
    named = [record[name] for name in TOPIC_FIELDS if name in record] if isinstance(record, dict) else []
    topic = next((value for value in named if isinstance(value, (str, int)) and not isinstance(value, bool)), "")
    return str(topic)[:MAX_TOPIC_CHARS]
