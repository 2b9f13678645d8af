"""The one exception that the command line turns into a clear line and exit code 2."""

from __future__ import annotations

_LONGEST = 1500  # characters of a message; what is quoted from a damaged file may be any length


class SuperegoError(Exception):
    """Bad input or an impossible request: says what, where, expected and found, what to do.

    The message is one line of printable text, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        if len(text) > _LONGEST:  # what to do stands at the end
            text = f"{text[: _LONGEST - 300]} … {text[-297:]}"
        super().__init__(text)


def printable(text: str, kept: str = "") -> str:
    """Text whose control characters, and bytes of names that are no text, are written out.

    They would break a line in two or steer the terminal. Those in `kept` stay.
    """
    return "".join(c if c.isprintable() or c in kept else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
