"""IFEval's rules of lm-eval, with sentences that are found without a network.

lm-eval cuts sentences with NLTK's Punkt and downloads its model `punkt_tab` when it is imported. Where that
model is not installed, Punkt runs with the abbreviations of this file instead, written as a model into a
temporary folder. Only instructions that count sentences or words in capitals depend on it.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from megatron_profit.evaluation.errors import require

INSTALLED = "NLTK's Punkt with its installed model punkt_tab"
OWN = "NLTK's Punkt with a list of English abbreviations (its model punkt_tab is not installed)"
# Abbreviations after which a sentence usually goes on, without their last dot.
ABBREVIATIONS = (
    "a.m adm approx apt assoc aug ave blvd bros capt cf cmdr corp dept dr e.g eds esq etc feb figs gen gov "
    "hon hr i.e inc jan jr lb lt ltd maj messrs mr mrs ms mt nov oct p.m ph.d pp prof rep sen sept sgt sr st "
    "u.k u.n u.s u.s.a univ viz vol vols vs"
).split()


@cache
def sentence_splitter() -> str:
    """Make a sentence splitter available to lm-eval, and return its description."""
    require("nltk", "langdetect", "immutabledict", for_what="the task ifeval")
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return INSTALLED
    except LookupError:
        folder = tempfile.mkdtemp(prefix="megatron-profit-punkt-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        model = Path(folder) / "tokenizers" / "punkt_tab" / "english"
        model.mkdir(parents=True)
        (model / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS) + "\n")
        for name in ("collocations.tab", "ortho_context.tab", "sent_starters.txt"):
            (model / name).touch()
        nltk.data.path.insert(0, folder)
        return OWN


@cache
def _rules() -> Callable[[Mapping[str, Any], list[str]], dict[str, Any]]:
    sentence_splitter()
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval.instructions import JsonFormat
    from lm_eval.tasks.ifeval.utils import process_results

    # It logs whole answers whose language it cannot tell, with the control characters in them.
    logging.getLogger("lm_eval.tasks.ifeval").setLevel(logging.CRITICAL)
    check = JsonFormat.check_following

    def is_json(rule: JsonFormat, answer: str) -> bool:
        try:
            return bool(check(rule, answer))
        except RecursionError:  # a thousand open brackets, by a model that repeats itself
            return False

    JsonFormat.check_following = is_json

    # Its answers to short texts are drawn at random otherwise.
    DetectorFactory.seed = 0
    return process_results


def followed_instructions(doc: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return lm-eval's four IFEval metrics of one answer.

    Args:
        doc: A record of IFEval: key, prompt, instruction_id_list and kwargs.
        text: The answer.
    """
    return _rules()(doc, [text])
