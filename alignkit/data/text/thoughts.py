"""Tell of thoughts: the fields that hold them, which a template reads, and which it leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from alignkit.data.text.dialogue import Message

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""The fields of a message that hold what the assistant thought before it answered."""


def thoughts_read(template: str) -> frozenset[str]:
    """Return the fields of thoughts that a chat template reads of a message.

    Example:
        >>> sorted(thoughts_read("{{ message.thinking }} {% if enable_thinking %}"))
        ['thinking']
    """
    return frozenset(each for each in THOUGHTS if re.search(rf"[.'\"]{each}\b", template))


def unread_names(lost: Collection[str], reads: Collection[str]) -> list[str]:
    """Return the names of fields that a format has no place for, with those it has for thoughts."""
    others = " or ".join(f"`{name}`" for name in THOUGHTS if name in reads)
    hint = f" (the chat template reads {others})" if others else ""
    return [f"`{name}`{hint if name in THOUGHTS else ''}" for name in sorted(lost)]


def lacks_thought(text: str, message: Message) -> bool:
    """Tell whether a message's rendered text is without what was thought before its words.

    A thought may also stand in the words, before ``</think>``.
    """
    fields = json.loads(message.fields) if message.fields else {}
    thoughts = [fields[name] for name in THOUGHTS if name in fields]
    before, mark, _ = message.content.rpartition("</think>")
    thoughts += [before.rpartition("<think>")[2]] if mark else []
    return not any(thought.strip() in text for thought in thoughts) if thoughts else False
