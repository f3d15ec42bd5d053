"""Makes foreign text safe to show: names, prompts and notes from any file or workflow.

``plain`` is for one line of text, ``markdown`` for what a page may render, ``csv_cell`` for a
spreadsheet, ``drawable`` for a picture, ``shown`` and ``said`` for an error message.
"""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import groupby
from typing import Any

# Controls, what changes the direction of the text around it, and letters that have no width.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    # Joiners belong to the spelling of Arabic and Indic scripts, and to joined emoji.
    "|(?<![\u0620-\u0dff\u1000-\u109f\u1780-\u17b3\u1820-\u18aa])\u200c"
    "|(?<![\u0620-\u0dff\u1000-\u109f\u1780-\u17b3\u1820-\u18aa\u2600-\u27bf\ufe0f"
    "\U0001f000-\U0001faff])\u200d"
)
_MARKUP = re.compile(
    r"[`*\[\]|~]"
    r"|\\(?=[!-/:-@\[-`{-~]|$)"  # before a letter Markdown takes it as it is
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word too
    r"|^(?:#{1,6}|[-+]|\d{1,9}[.)])(?=\s|$)"
)
_ENTITY = re.compile(r"&(?=#?\w+;)")
# What a spreadsheet takes for a formula (OWASP, "CSV Injection"), in full width too.
_FORMULA = re.compile("\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
MOST_DRAWN = 2000  # characters; a picture never has room for more


def plain(text: str, most: int = 0) -> str:
    """``text`` on one line, with what can't be seen or reorders the rest as visible escapes.

    Letters of every script stay.  At most ``most`` characters, if it is not 0.
    """
    if most:
        text = text[: most + 1]
    text = _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if not most or len(text) <= most else f"{text[: most - 3]}..."


def markdown(text: str, most: int = 0) -> str:
    """``plain(text, most)`` that Markdown and HTML render as it is: no markup, link or tag."""
    text = plain(text, most)
    text = _MARKUP.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", text)
    return _ENTITY.sub("&amp;", text).replace("<", "&lt;").replace(">", "&gt;")


def markup_free(text: str) -> str:
    """Several lines of ``text`` for a page that takes them for HTML."""
    return html.escape(text, quote=False)


def json_for_page(text: str) -> str:
    """JSON ``text`` that a page may take for HTML: the same JSON, without a tag in it."""
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def csv_cell(value: Any) -> Any:
    """``value`` for a CSV writer: text can't be a formula; numbers and None stay as they are."""
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if _FORMULA.match(value) else plain(value)


def drawable(text: str) -> str:
    """``text`` in the ASCII that PIL's own font has.

    Accents are dropped; of other scripts it is said how many characters stand there, as in
    "[Cyrillic:6]".
    """
    text = plain(text, MOST_DRAWN)
    if text.isascii():
        return text
    spelt = unicodedata.normalize("NFKD", text)
    letters = "".join(c for c in spelt if not unicodedata.combining(c))
    runs = ((known, "".join(run)) for known, run in groupby(letters, str.isascii))
    return "".join(run if known else f"[{_scripts(run)}:{len(run)}]" for known, run in runs)


def _scripts(run: str) -> str:
    letters = (c for c in run if unicodedata.category(c).startswith("L"))
    names = (unicodedata.name(c, "other").split()[0].capitalize() for c in letters)
    return "/".join(dict.fromkeys(names)) or "symbols"


def said(error: BaseException, most: int = 200) -> str:
    """What a library's ``error`` says, for a message of this pack: its first line, shortened.

    Libraries repeat what they read, and at times say nothing: then it is the error's kind.
    """
    lines = str(error).strip().splitlines()
    return plain(lines[0], most) if lines else type(error).__name__


def shown(value: Any, most: int = 120) -> str:
    """``value`` for an error message: short, on one line and encodable, whatever it is."""
    if isinstance(value, str):
        value = value[: most + 1]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nesting
        text = f"a {type(value).__name__}"
    return plain(text, most)
