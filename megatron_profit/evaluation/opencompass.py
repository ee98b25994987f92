"""The same evaluation for OpenCompass, the harness of ProFit's authors, as a file of its settings.

OpenCompass needs older versions of numpy and datasets than this package, so it runs in an environment of its
own. Its prompts and graders are not the ones here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

if TYPE_CHECKING:
    from megatron_profit.evaluation.questions import Task

VERSION = "0.5.4"
# Task -> OpenCompass's settings that ask zero-shot and grade by rule: folder, file, and name in it.
DATASETS = {
    "gsm8k": ("gsm8k", "gsm8k_0shot_v2_gen_a58960", "gsm8k_datasets"),
    "math500": ("math", "math_prm800k_500_0shot_cot_gen", "math_datasets"),
    "aime24": ("aime2024", "aime2024_gen_17d799", "aime2024_datasets"),
    "gpqa_diamond": ("gpqa", "gpqa_openai_simple_evals_gen_5aeece", "gpqa_datasets"),
    "ifeval": ("IFEval", "IFEval_gen_353ae7", "ifeval_datasets"),
}


def opencompass_settings(
    models: Mapping[str, str], tasks: Sequence[tuple[Task, Sampling]], dtype: str
) -> str:
    """Return a file of settings for OpenCompass with vLLM.

    Args:
        models: Label -> HuggingFace folder.
        tasks: The tasks with their settings, which must draw alike.
        dtype: Of the weights, as vLLM names it; "auto" is its choice.

    Raises:
        EvaluationError: OpenCompass has no such task, an adapter is not merged, or tasks draw differently.
    """
    from megatron_profit.evaluation.engines.model_folder import base_of

    if lacking := [task.name for task, _ in tasks if task.name not in DATASETS]:
        raise EvaluationError(
            f"--opencompass: OpenCompass does not grade {', '.join(lacking)} by rule; it has "
            f"{', '.join(DATASETS)}"
        )
    for model in models.values():
        if base_of(Path(model)) != Path(model):
            raise EvaluationError(
                f"--opencompass: {model} is an adapter; export a merged model with --export-hf"
            )
    drawn = {_generation(sampling) for _, sampling in tasks}
    if len(drawn) > 1:
        raise EvaluationError(
            "--opencompass: the tasks are drawn differently; write a file for each"
        )
    longest = {
        task.name: sampling.max_new_tokens or task.longest_answer for task, sampling in tasks
    }
    names = [DATASETS[task.name][2] for task, _ in tasks]
    return _FILE.format(
        version=VERSION,
        imports="\n".join(_IMPORT.format(*DATASETS[task.name]) for task, _ in tasks),
        samples="\n".join(
            _SAMPLES.format(name, sampling.samples, longest[task.name])
            for name, (task, sampling) in zip(names, tasks, strict=True)
        ),
        datasets=", ".join(f"*{name}" for name in names),
        models="\n".join(
            _MODEL.format(label, str(Path(model).absolute()), *drawn, max(longest.values()), dtype)
            for label, model in models.items()
        ),
    )


def _generation(sampling: Sampling) -> str:
    """Return the settings of vLLM's draws as arguments of a dict."""
    top_k = f", top_k={sampling.top_k}" if sampling.top_k else ""
    return f"temperature={sampling.temperature}, top_p={sampling.top_p}{top_k}"


_IMPORT = "    from opencompass.configs.datasets.{}.{} import {}"
_SAMPLES = """for dataset in {0}:
    dataset["n"] = dataset["k"] = {1}
    dataset["infer_cfg"]["inferencer"]["max_out_len"] = {2}
"""
_MODEL = """    dict(
        type=VLLMwithChatTemplate,
        abbr={0!r},
        path={1!r},
        model_kwargs=dict(trust_remote_code=False, dtype={4!r}),
        generation_kwargs=dict({2}),
        max_out_len={3},
        batch_size=512,
        run_cfg=dict(num_gpus=1),
    ),"""
_FILE = """# Settings of an evaluation for OpenCompass {version} with vLLM.
from mmengine.config import read_base

with read_base():
{imports}

from opencompass.models import VLLMwithChatTemplate

{samples}
datasets = [{datasets}]
models = [
{models}
]
"""
