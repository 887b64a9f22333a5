"""The tokenizer: a fixed vocabulary of bytes, a few special tokens and some words, reversible without loss.

Text becomes words where it holds them and UTF-8 bytes elsewhere, so every text survives a round trip and
a token-id prompt may hold any id below :data:`VOCAB_SIZE`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import lru_cache

VOCAB_SIZE = 151_936
EOS_ID = 256
_SPECIALS = {"<|endoftext|>": EOS_ID, "<|im_start|>": 257, "<|im_end|>": 258, "<tool_call>": 259, "</tool_call>": 260}
_FIRST_WORD = 300

WORDS: tuple[str, ...] = tuple(
    " " + word
    for word in (
        "the of and to in is it that was for on are with as his they at be this from have or by one had "
        "not but what all were when we there can an your which their said if do will each about how up "
        "out them then she many some so these would other into has more her two like him see time could "
        "no make than first been its who now people my made over did down only way find use may water "
        "long little very after words called just where most know get through back much before go good "
        "new write our used me man too any day same right look think also around another came come work "
        "three word must because does part even place well such here take why things help put years "
        "different away again off went old number great tell men say small every found still between "
        "name should home big give air line set own under read last never us left end along while might "
        "next sound below saw something thought both few those always looked café naïve Straße 東京 数据 "
        "данные → ✓ 🙂 año"
    ).split()
)
_GARBAGE_WORD = " ▓▒░"
GARBAGE_ID = _FIRST_WORD + len(WORDS)

_TEXT_OF: dict[int, bytes] = {
    **{byte: bytes([byte]) for byte in range(256)},
    **{number: text.encode() for text, number in _SPECIALS.items()},
    **{_FIRST_WORD + i: word.encode() for i, word in enumerate((*WORDS, _GARBAGE_WORD))},
}
_ID_OF: dict[str, int] = {
    **_SPECIALS,
    **{word: _FIRST_WORD + i for i, word in enumerate((*WORDS, _GARBAGE_WORD))},
}
_LONGEST_WORD = max(map(len, WORDS))
_MARK = "|".join(map(re.escape, _SPECIALS))
_PIECE = re.compile(rf"{_MARK}|<\|token_[1-9][0-9]{{2,5}}\|>| ?[^\s<]+|[\s\S]")


def encode(text: str) -> list[int]:
    """Token ids of ``text``; a lone surrogate becomes ``?``."""
    ids: list[int] = []
    for piece in _PIECE.findall(text):
        ids.extend(_encode_piece(piece))
    return ids


@lru_cache(maxsize=65536)
def _encode_piece(piece: str) -> tuple[int, ...]:
    whole = _ID_OF.get(piece)
    if whole is not None:
        return (whole,)
    if piece.startswith("<|token_"):
        number = int(piece[8:-2])
        if number not in _TEXT_OF and number < VOCAB_SIZE:
            return (number,)
    # Words begin with their space, so only the beginning of a piece can be one.
    for length in range(min(len(piece) - 1, _LONGEST_WORD), 1, -1):
        word = _ID_OF.get(piece[:length])
        if word is not None:
            return (word, *piece[length:].encode("utf-8", "replace"))
    return tuple(piece.encode("utf-8", "replace"))


def token_bytes(number: int) -> bytes:
    """The bytes that one token stands for."""
    known = _TEXT_OF.get(number)
    return known if known is not None else b"<|token_%d|>" % number


def decode(ids: Iterable[int], *, skip_special: bool = False) -> str:
    """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(token_bytes(number) for number in ids if not (skip_special and is_control(number))).decode(
        "utf-8", "replace"
    )


def is_control(number: int) -> bool:
    """True for the tokens that ``skip_special_tokens`` hides (the tool-call marks are text, as in Qwen3)."""
    return 256 <= number <= 258


def word_id(index: int) -> int:
    """The id of the ``index``-th word, counted round and round."""
    return _FIRST_WORD + index % len(WORDS)


class StreamDecoder:
    """Token by token to text: bytes of an unfinished character are held back, as vLLM's detokenizer does."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, number: int, *, final: bool = False) -> str:
        """The text that ``number`` completes; with ``final``, also what was held back."""
        data = b"" if is_control(number) else token_bytes(number)
        return self._utf8.decode(data, final)
