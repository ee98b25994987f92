"""Reinforcement learning from an export: GRPO on GSM8K with a reward by rule, with TRL.

    pip install trl
    python examples/grpo_after_sft.py --model runs/profit/hf --data gsm8k_train.jsonl --out runs/profit-grpo

On one GPU with a 0.6B model, generation by vLLM in the same process:

    pip install vllm
    python examples/grpo_after_sft.py --model runs/profit/hf --data gsm8k_train.jsonl --out runs/profit-grpo \
        --steps 200 --prompts 16 --generations 8 --max-new-tokens 1024 --lr 1e-6 --vllm

ProFit's authors report that RL ends higher when it begins from a ProFit model. This script shows the way and
makes no such claim. The reward is 1 if the final number of an answer is right, else 0, by the grader of
`megatron-profit evaluate`. Compare the models before and after:

    megatron-profit evaluate before=runs/profit/hf after=runs/profit-grpo --tasks gsm8k

verl reads parquet. `--verl-data FILE.parquet` writes it and prints verl's launch line instead of training.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.graders import grade_number
from megatron_profit.evaluation.tasks.functions import reference_of

SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# verl's reward of GSM8K reads the number after "####", and no other form.
VERL_SUFFIX = (
    '\nPlease reason step by step, and write your final answer after "#### ", as in "#### 42".'
)


def read_questions(file: Path) -> list[dict[str, Any]]:
    """Return prompts and reference answers of GSM8K's records.

    Raises:
        EvaluationError: The file cannot be read, or a record has no question or answer.
    """
    questions: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                message = {"role": "user", "content": record["question"] + SUFFIX}
                questions.append({"prompt": [message], "reference": reference_of(record["answer"])})
    except OSError as error:
        raise EvaluationError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file}, line {len(questions) + 1}: must be an object with question and answer ({error!r})"
        ) from error
    return questions


def reward(completions: Sequence[Any], reference: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion whose final number is right, else 0.

    Args:
        completions: Each a list of messages, of which the last is the answer.
        reference: The right answer of each.
    """
    texts = [completion[-1]["content"] for completion in completions]
    return [
        float(grade_number(text, right).right) for text, right in zip(texts, reference, strict=True)
    ]


def train(arguments: argparse.Namespace, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train with TRL's GRPOTrainer, save the model in --out, and return the log."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    on_gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        num_generations=arguments.generations,
        per_device_train_batch_size=arguments.prompts * arguments.generations,
        max_completion_length=arguments.max_new_tokens,
        learning_rate=arguments.lr,
        beta=0.0,  # no reference model, as in DAPO
        bf16=on_gpu,
        use_cpu=not on_gpu,
        use_vllm=arguments.vllm,
        seed=arguments.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    trainer = GRPOTrainer(
        model=str(arguments.model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(questions),
        processing_class=AutoTokenizer.from_pretrained(arguments.model, padding_side="left"),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def write_verl_data(file: Path, questions: list[dict[str, Any]]) -> None:
    """Write the questions as the parquet that verl reads; verl has the reward of GSM8K itself.

    They ask for the form of an answer that this reward reads. It compares texts without commas.
    """
    from datasets import Dataset

    rows = []
    for index, question in enumerate(questions):
        (message,) = question["prompt"]
        content = message["content"].removesuffix(SUFFIX) + VERL_SUFFIX
        right = question["reference"].replace(",", "")
        rows.append(
            {
                "data_source": "openai/gsm8k",
                "prompt": [{**message, "content": content}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": right},
                "extra_info": {"index": index},
            }
        )
    Dataset.from_list(rows).to_parquet(str(file))


def verl_command(arguments: argparse.Namespace) -> str:
    """Return verl's launch line for the same training."""
    settings = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": arguments.verl_data,
        "data.val_files": arguments.verl_data,
        "data.train_batch_size": arguments.prompts,
        "data.max_response_length": arguments.max_new_tokens,
        "actor_rollout_ref.model.path": arguments.model,
        "actor_rollout_ref.actor.optim.lr": arguments.lr,
        "actor_rollout_ref.actor.ppo_mini_batch_size": arguments.prompts,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": arguments.generations,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": arguments.steps,
        "trainer.default_local_dir": arguments.out,
    }
    return shlex.join(
        ["python", "-m", "verl.trainer.main_ppo", *(f"{k}={v}" for k, v in settings.items())]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or write verl's data; return 1 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="HuggingFace folder to begin from")
    add("--data", type=Path, required=True, metavar="FILE", help="GSM8K's training records")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the trained model")
    add("--steps", type=int, default=3)
    add("--prompts", type=int, default=2, help="questions in a step")
    add("--generations", type=int, default=4, help="answers to each question")
    add("--max-new-tokens", type=int, default=64)
    add("--lr", type=float, default=1e-6)
    add("--seed", type=int, default=1234)
    add("--vllm", action="store_true", help="generate with vLLM")
    add("--verl-data", type=Path, metavar="FILE.parquet", help="write data for verl, do not train")
    arguments = parser.parse_args(argv)
    try:
        questions = read_questions(arguments.data)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.verl_data is not None:
        write_verl_data(arguments.verl_data, questions)
        print(verl_command(arguments))
        return 0
    if importlib.util.find_spec("trl") is None:
        print("error: this example needs TRL; run pip install trl", file=sys.stderr)
        return 1
    for entry in train(arguments, questions):
        if "reward" in entry:
            print(f"step {entry.get('step')}: mean reward {entry['reward']:.3f}")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
