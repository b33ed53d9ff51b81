"""Which answers rules for English cannot read: those in another language, told by its script or its small words.

Owns the lists of such words (`words/languages.txt`); knows nothing of stances. Made for a few sentences, not for names
or single words: a text of which nothing is known counts as English.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from importlib import resources

_READ = 400  # characters of an answer, from its beginning
_FEWEST = 2  # small words of a language before it is believed
_NAMES = re.compile(
    r"\b(?:spanish|french|german|chinese|mandarin|cantonese|portuguese|italian|dutch|japanese|korean|russian|arabic|hindi"
    r"|latin|greek|turkish|polish|swedish|languages?|translat\w*|untranslated)\b",
    re.IGNORECASE,
)
_WORDING = re.compile(r"\b(?:translat\w*|say|said|means?|word|phrase|sentence|pronounce\w*|spell\w*)\b", re.IGNORECASE)


@cache
def _lists() -> dict[str, frozenset[str]]:
    """Small words by language, and the entry `refusals`; words that several languages have stay with each of them."""
    text = (resources.files("neurondrift.models.text") / "words" / "languages.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^(\w+): (.*(?:\n    .*)*)", text, re.M)
    return {name: frozenset(" ".join(w.split()) for w in words.split(",") if w.strip()) for name, words in entries}


def unread(prompt: str, answer: str) -> str | None:
    """The language or script of an answer that is not in English; None where it is, or where another one was asked for.

    Where the prompt names a language, a foreign text may be the answer itself: it counts as unread only if it holds
    words of refusal and no wording was asked about.
    """
    start = unicodedata.normalize("NFKC", answer)[:_READ].lower()
    found = _script(start) or _language(start)
    if found is None or not _NAMES.search(prompt):
        return found
    refuses = any(words in start for words in _lists()["refusals"])
    return found if refuses and not _WORDING.search(prompt) else None


def _script(text: str) -> str | None:
    """The script of most letters, where that is not Latin."""
    names = [unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()]
    others = [name for name in names if name not in ("LATIN", "MODIFIER", "FULLWIDTH")]
    return max(set(others), key=others.count).capitalize() if len(others) > max(3, len(names) / 2) else None


def _language(text: str) -> str | None:
    """The language whose small words are the most, where they are at least two and more than English ones."""
    words = re.findall(r"[^\W\d_]+", text)
    counts = {name: sum(word in known for word in words) for name, known in _lists().items() if name != "refusals"}
    english = counts.pop("English")
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] >= max(_FEWEST, 2 * english, len(words) / 8) else None
