"""The token report in a terminal: the colour is the probability, a struck-out token is dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_profit.token_report.scores import TokenRecord

# xterm's 256-colour palette from unlikely to likely, dark enough for white text.
_SCALE = (88, 94, 100, 58, 64, 28, 29, 30, 24, 25)
# Layout, and the joiners within an emoji or a word.
_HARMLESS = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
# Stands for a token that continues the character before it, as in page.html.
_CONTINUES = "◂"
_RESET, _DIM, _STRUCK = "\x1b[0m", "\x1b[2m", "\x1b[9m"


def terminal_text(record: TokenRecord, objective: str, *, color: bool) -> str:
    """Return a record as text.

    Args:
        record: the record.
        objective: the one of its objectives that decides which tokens are dropped.
        color: whether to colour; without, a dropped token stands in [-brackets-] and the prompt is plain.
    """
    weights = record.weights[objective].tolist()
    prob = record.statistics.prob.tolist()
    supervised = record.supervised.tolist()
    tell = _coloured if color else _plain
    pieces = zip(record.pieces, prob, supervised, weights, strict=True)
    text = "".join(tell(_printable(p) or _CONTINUES, *rest) for p, *rest in pieces)
    kept = sum(w != 0 for w in weights)
    total = sum(supervised)
    share = f"{kept / total:.1%}" if total else "none"
    return (
        f"{record.name}: {kept} of {total} supervised tokens kept by {objective} ({share})\n{text}"
    )


def probabilities_text(pieces: Sequence[str], probs: Sequence[float], *, color: bool) -> str:
    """Return tokens with their probabilities: the colour of each, or a table without colour.

    Args:
        pieces: Text of each token.
        probs: Probability of each token.
        color: Whether to colour.
    """
    shown = [_printable(piece) or _CONTINUES for piece in pieces]
    if color:
        scale = "".join(_coloured(f" {i / 10:.1f} ", i / 10 + 0.05, True, 1.0) for i in range(10))
        text = "".join(_coloured(p, prob, True, 1.0) for p, prob in zip(shown, probs, strict=True))
        return f"{text}\nprobability from {scale}"
    return "\n".join(f"{prob:.3f}  {piece!r}" for piece, prob in zip(shown, probs, strict=True))


def _coloured(piece: str, prob: float, supervised: bool, weight: float) -> str:
    if not supervised or math.isnan(prob):
        return f"{_DIM}{piece}{_RESET}"
    background = _SCALE[min(int(prob * len(_SCALE)), len(_SCALE) - 1)]
    style = f"\x1b[97;48;5;{background}m" + (_STRUCK if weight == 0 else "")
    # A coloured line break would colour the rest of the line.
    return "\n".join(f"{style}{line}{_RESET}" if line else "" for line in piece.split("\n"))


def _plain(piece: str, prob: float, supervised: bool, weight: float) -> str:
    return f"[-{piece}-]" if supervised and weight == 0 else piece


def _printable(piece: str) -> str:
    """Escape the record's own control characters, which must not steer the terminal."""
    return "".join(
        c if c.isprintable() or c in _HARMLESS else "\N{REPLACEMENT CHARACTER}" for c in piece
    )
