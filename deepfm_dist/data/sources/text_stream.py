"""Converts a text file's bytes to UTF-8 for Arrow's reader, and checks quotes.

Arrow silently reads an unclosed quote as one cell with all following rows, and text after a closing
quote as part of the cell. Both are refused here.
"""

import codecs
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled

NO_TEXT = "\uffff"
"""A non-character that marks undecodable bytes until their row is dropped."""
_REPLACING = "deepfm_dist.no_text"
codecs.register_error(_REPLACING, lambda error: (NO_TEXT, getattr(error, "end")))  # noqa: B009
_UTF_8 = ("utf-8", "utf-8-sig")
_MOST_HELD_BYTES = 64 << 20  # of a line without an end: far more than Arrow accepts

_CELL_BEGINS, _PLAIN, _QUOTED, _QUOTE_IN_QUOTED = range(4)
_STATE, _OPENED_AT, _LINES, _MOST_LINES, _MOST_LINES_AT, _IS_ESCAPED = range(6)


class QuoteError(ValueError):
    """A cell's quotes are malformed.

    Args:
        offset: bytes of the stream before the cell's opening quote.
        is_closed: whether it is closed, but followed by text.
    """

    def __init__(self, offset: int, is_closed: bool) -> None:
        super().__init__("text after a closing quote" if is_closed else "an unclosed quote")
        self.offset, self.is_closed = offset, is_closed


class Quotes:
    """Tracks quotes: a cell that begins with one extends to the next.

    Two quotes within such a cell mean one.

    Args:
        delimiter: between cells, one byte.
        escape: character that escapes the next one; or None.

    Attributes:
        most_lines: maximum number of line ends in a cell.
        most_lines_at: bytes before the opening quote of that cell.
    """

    def __init__(self, delimiter: str, escape: str | None = None) -> None:
        self._delimiter, self._before = ord(delimiter), 0
        self._escape = -1 if escape is None else ord(escape)
        self._found = np.zeros(6, np.int64)

    most_lines = property(lambda self: int(self._found[_MOST_LINES]))
    most_lines_at = property(lambda self: int(self._found[_MOST_LINES_AT]))

    def follow(self, lines: bytes) -> None:
        """Processes complete lines.

        Raises:
            QuoteError: text follows a closing quote.
        """
        if b'"' in lines or self._found[_STATE] == _QUOTED:
            text = np.frombuffer(lines, np.uint8)
            if _followed(text, self._delimiter, self._escape, self._before, self._found):
                raise QuoteError(int(self._found[_OPENED_AT]), is_closed=True)
        self._before += len(lines)

    def end(self) -> None:
        """Marks the end of the stream.

        Raises:
            QuoteError: the last cell's quote is not closed.
        """
        if self._found[_STATE] == _QUOTED:
            raise QuoteError(int(self._found[_OPENED_AT]), is_closed=False)


@compiled
def _followed(
    text: npt.NDArray[np.uint8],
    delimiter: int,
    escape: int,
    before: int,
    scan: npt.NDArray[np.int64],
) -> bool:
    """Scans text from ``scan`` on; returns whether it stopped at an irregularity."""
    state, opened_at, lines = scan[_STATE], scan[_OPENED_AT], scan[_LINES]
    is_escaped = scan[_IS_ESCAPED]
    for i in range(len(text)):
        byte = text[i]
        if is_escaped:
            is_escaped = 0
            lines += byte == 10
        elif byte == escape and state != _QUOTE_IN_QUOTED:
            is_escaped = 1
            state = _PLAIN if state == _CELL_BEGINS else state
        elif state == _QUOTED:
            if byte == 34:
                state = _QUOTE_IN_QUOTED
            lines += byte == 10
        elif state == _QUOTE_IN_QUOTED and byte == 34:
            state = _QUOTED
        elif byte == delimiter or byte == 10 or byte == 13:
            if state == _QUOTE_IN_QUOTED and lines > scan[_MOST_LINES]:
                scan[_MOST_LINES], scan[_MOST_LINES_AT] = lines, opened_at
            state = _CELL_BEGINS
        elif state == _QUOTE_IN_QUOTED:
            scan[_OPENED_AT] = opened_at
            return True
        elif state == _CELL_BEGINS and byte == 34:
            state, opened_at, lines = _QUOTED, before + i, 0
        else:
            state = _PLAIN
    scan[_STATE], scan[_OPENED_AT], scan[_LINES] = state, opened_at, lines
    scan[_IS_ESCAPED] = is_escaped
    return False


class TextStream(io.RawIOBase):
    """A stream of UTF-8 whose last line is always terminated.

    Each read ends at a line end if the buffer has room for a line.

    Args:
        stream: Arrow's, of the text's bytes.
        encoding: the encoding of the text.
        replace: whether undecodable bytes become `NO_TEXT`; otherwise the decoder raises, or Arrow
            does if the text is UTF-8.
        rewrite: changes complete lines.
        quotes: receives everything that is read.
    """

    def __init__(
        self,
        stream: Any,
        encoding: str,
        replace: bool = False,
        rewrite: Callable[[bytes], bytes] = bytes,
        quotes: Quotes | None = None,
    ) -> None:
        self._of_arrow, self._rewrite, self._quotes = stream, rewrite, quotes
        self._replace = replace
        self._decoder: codecs.IncrementalDecoder | None = None
        if codecs.lookup(encoding).name not in _UTF_8:
            errors = _REPLACING if replace else "strict"
            self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._begun, self._ready, self._ended = b"", memoryview(b""), False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills part of a buffer; returns 0 at the end."""
        while not (self._ready or self._ended):
            wanted = max(len(buffer) - len(self._begun), 1 << 12)
            self._ready = memoryview(self._lines(self._of_arrow.read(wanted)))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _lines(self, block: bytes) -> bytes:
        """The lines completed by a block; the remainder if the block is empty."""
        self._ended = not block
        text = block
        if self._decoder is not None:
            text = self._decoder.decode(block, final=self._ended).encode()
        text = self._begun + text
        if self._ended:
            end = len(text)
            text += b"" if not text or text.endswith((b"\n", b"\r")) else b"\n"
        else:  # a \r may be the first half of \r\n
            end = 1 + max(text.rfind(b"\n"), text.rfind(b"\r", 0, len(text) - 1))
            if end == 0 and len(text) > _MOST_HELD_BYTES:
                end = len(text)
        lines, self._begun = (text, b"") if self._ended else (text[:end], text[end:])
        if self._replace and self._decoder is None:
            try:
                lines.decode()
            except UnicodeDecodeError:
                lines = lines.decode(errors=_REPLACING).encode()
        lines = self._rewrite(lines)
        if self._quotes is not None:
            self._quotes.follow(lines)
            if self._ended:
                self._quotes.end()
        return lines
