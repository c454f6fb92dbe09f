"""A text file's bytes -> UTF-8 as Arrow's reader wants it, its quotes looked after.

Arrow takes a quote that is never closed for one cell with all the rows behind it, and text behind a
closing quote for a part of the cell: rows that are gone without a word. Here both are refused.
"""

import codecs
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled

NO_TEXT = "\uffff"
"""Not a character: marks bytes that cannot be decoded, until their row is dropped."""
_REPLACING = "deepfm_dist.no_text"
codecs.register_error(_REPLACING, lambda error: (NO_TEXT, getattr(error, "end")))  # noqa: B009
_UTF_8 = ("utf-8", "utf-8-sig")
_MOST_HELD_BYTES = 64 << 20  # of a line without an end: far more than Arrow takes

_CELL_BEGINS, _PLAIN, _QUOTED, _QUOTE_IN_QUOTED = range(4)
_STATE, _OPENED_AT, _LINES, _MOST_LINES, _MOST_LINES_AT, _IS_ESCAPED = range(6)


class QuoteError(ValueError):
    """A cell's quotes are not in order.

    Args:
        offset: bytes of the stream before the quote that opens the cell.
        is_closed: whether there is a closing one, with text behind it.
    """

    def __init__(self, offset: int, is_closed: bool) -> None:
        super().__init__("text after a closing quote" if is_closed else "an unclosed quote")
        self.offset, self.is_closed = offset, is_closed


class Quotes:
    """Follows the quotes of a text in which a cell that begins with one goes to the next.

    Two quotes within such a cell stand for one.

    Args:
        delimiter: between cells, one byte.
        escape: character after which any other is text; or None.

    Attributes:
        most_lines: line ends within one cell, at most.
        most_lines_at: bytes before the quote that opens this cell.
    """

    def __init__(self, delimiter: str, escape: str | None = None) -> None:
        self._delimiter, self._before = ord(delimiter), 0
        self._escape = -1 if escape is None else ord(escape)
        self._found = np.zeros(6, np.int64)

    most_lines = property(lambda self: int(self._found[_MOST_LINES]))
    most_lines_at = property(lambda self: int(self._found[_MOST_LINES_AT]))

    def follow(self, lines: bytes) -> None:
        """Takes whole lines in.

        Raises:
            QuoteError: text stands behind a closing quote.
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
    """Continues from ``scan`` through a text; whether it stopped at an irregularity."""
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
    """A stream of UTF-8 in which the last line has an end, too.

    What is read at once ends with a line where the buffer has room for one.

    Args:
        stream: Arrow's, of the text's bytes.
        encoding: of the text.
        replace: whether bytes that are no text become `NO_TEXT`; else they raise what the decoder
            raises, or are left to Arrow where the text is UTF-8 already.
        rewrite: changes whole lines.
        quotes: is shown all that is read.
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
        """Fills a buffer, in part; 0 at the end."""
        while not (self._ready or self._ended):
            wanted = max(len(buffer) - len(self._begun), 1 << 12)
            self._ready = memoryview(self._lines(self._of_arrow.read(wanted)))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _lines(self, block: bytes) -> bytes:
        """The lines that end with a block; all that is left where it is empty."""
        self._ended = not block
        text = block
        if self._decoder is not None:
            text = self._decoder.decode(block, final=self._ended).encode()
        text = self._begun + text
        if self._ended:
            end = len(text)
            text += b"" if not text or text.endswith((b"\n", b"\r")) else b"\n"
        else:  # a \r may be half of a line's end
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
