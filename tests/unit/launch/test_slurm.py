"""The job of `megatron-profit slurm`: a script that bash understands, submitted or printed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess

import pytest

from megatron_profit.estimates.published import published_config
from megatron_profit.launch import slurm

JOB = [
    *("--nodes", "2", "--partition", "gpu", "--time", "1-0", "--sbatch=--qos=high"),
    *("--", "sft", "--model", "Qwen/Qwen3-32B", "--data", "my chats.jsonl", "--run", "runs/big"),
]
STUBS = {
    # Like a job of many nodes, in Slurm's order: a reader of the first line alone must not end the writer.
    "scontrol": "seq -f node%g 9 20000",
    "srun": 'shift\nprintf "%s|" "$@"',
    "sbatch": 'echo "submitted $1"',
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Commands of Slurm that only print their arguments."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def test_a_dry_run_prints_the_script_and_writes_none(cluster, capsys):
    assert slurm.main(["--dry-run", *JOB]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --qos=high\n" in text
    assert not (cluster / "runs").exists()


def test_the_job_starts_the_command_on_each_node(cluster, capfd):
    assert slurm.main(JOB) == 0
    script = cluster / "runs" / "big" / "job.sbatch"
    assert "submitted runs/big/job.sbatch" in capfd.readouterr().out
    environment = {
        **os.environ,
        "SLURM_JOB_NODELIST": "node[9-20000]",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }
    started = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    words = started.stdout.split("|")
    assert words[1:4] == ["-m", "megatron_profit", "sft"]
    assert words[4:-1] == [
        *("--model", "Qwen/Qwen3-32B", "--data", "my chats.jsonl", "--run", "runs/big"),
        *("--rank-logs", "--max-restarts", "3"),
        *("--nnodes", "2", "--rdzv-id", "12345", "--rdzv-endpoint", "node10:22345"),
    ]


def mounts_of(text: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if "--container-mounts=" in line)
    return line.split("=", 1)[1].removesuffix(" \\").strip("'").split(",")


def test_a_container_sees_the_folders_that_the_command_names(cluster, capsys):
    (cluster / "elsewhere" / "Qwen3-4B").mkdir(parents=True)
    (cluster / "elsewhere" / "chats.jsonl").touch()
    (cluster / "work").mkdir()
    os.chdir(cluster / "work")
    own = ["--container", "image.sqsh", "--mount", "/scratch", "--nodes", "1", "--dry-run"]
    run = ["--data", "../elsewhere/chats.jsonl", "--run", "runs/big"]
    assert slurm.main([*own, "--", "sft", "--model", f"{cluster}/elsewhere/Qwen3-4B", *run]) == 0
    text = capsys.readouterr().out
    expected = [cluster / "elsewhere", cluster / "work", "/scratch"]
    assert sorted(mounts_of(text)) == sorted(f"{place}:{place}" for place in expected)
    assert f"--container-workdir={cluster / 'work'} " in text
    assert " python -m megatron_profit sft " in text, "the image's own Python"
    assert (
        f"export MEGATRON_PROFIT_CACHE={cluster / 'work' / 'runs' / 'big' / 'data-cache'}\n" in text
    )
    assert "HF_HOME" not in text


def test_a_container_sees_the_chat_template_and_what_links_of_the_model_lead_to(cluster, capsys):
    """A folder of the hub's cache holds links to the files of another one."""
    for name in ("blobs", "elsewhere", "snapshot", "templates", "work"):
        (cluster / name).mkdir()
    (cluster / "snapshot" / "folder").symlink_to("../elsewhere")
    (cluster / "blobs" / "1f").touch()
    (cluster / "snapshot" / "model.safetensors").symlink_to("../blobs/1f")
    (cluster / "templates" / "own.jinja").touch()
    os.chdir(cluster / "work")
    own = ["--container", "image.sqsh", "--nodes", "1", "--dry-run", "--", "sft"]
    more = ["--data", "chats.jsonl", "--chat-template", f"{cluster}/templates/own.jinja"]
    assert slurm.main([*own, "--model", "../snapshot", *more]) == 0
    named = ("blobs", "elsewhere", "snapshot", "templates", "work")
    expected = [cluster / name for name in named]
    assert mounts_of(capsys.readouterr().out) == [f"{place}:{place}" for place in expected]


def test_a_container_sees_the_files_of_the_evaluation(cluster, capsys):
    for name in ("questions", "tasks", "work"):
        (cluster / name).mkdir()
    (cluster / "tasks" / "sums.yaml").touch()
    os.chdir(cluster / "work")
    own = ["--container", "image.sqsh", "--nodes", "1", "--dry-run", "--", "sft"]
    flags = f"--data {cluster}/questions --samples 8 --task-file={cluster}/tasks/sums.yaml"
    run = ["--model", "../work", "--data", "chats.jsonl", "--eval-flags", flags]
    assert slurm.main([*own, *run]) == 0
    expected = [cluster / name for name in ("questions", "tasks", "work")]
    assert mounts_of(capsys.readouterr().out) == [f"{place}:{place}" for place in expected]
    assert slurm.main([*own, *run[:-1], "--data 'x"]) == 2
    assert """--eval-flags "--data 'x": No closing quotation""" in capsys.readouterr().err


def test_a_container_sees_the_hubs_cache_where_ids_are_given(cluster, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    own = ["--container", "image.sqsh", "--nodes", "1", "--dry-run", "--", "sft"]
    for flags in (
        ["--model", "Qwen/Qwen3-4B", "--data", "x.jsonl"],
        ["--model", "Q", "--data", "o/d"],
    ):
        assert slurm.main([*own, *flags]) == 0
        text = capsys.readouterr().out
        assert "/shared/hf:/shared/hf" in mounts_of(text)
        assert "export HF_HOME=/shared/hf\n" in text


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("HF_HUB_CACHE", "/scratch/hub"),
        ("HUGGINGFACE_HUB_CACHE", "/scratch/hub"),
        ("XDG_CACHE_HOME", "/scratch/hub/huggingface"),
    ],
)
def test_a_container_sees_the_hubs_cache_where_a_variable_puts_it(
    cluster, monkeypatch, capsys, variable, place
):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/scratch/hub")
    own = ["--container", "image.sqsh", "--nodes", "1", "--dry-run", "--", "sft"]
    assert slurm.main([*own, "--model", "Qwen/Qwen3-4B", "--data", "x.jsonl"]) == 0
    assert f"{place}:{place}" in mounts_of(capsys.readouterr().out)


def test_a_rank_that_the_container_names_does_not_reach_the_command(cluster, capsys):
    """enroot's hook 50-slurm-pytorch.sh sets RANK, with which the command would take itself for a rank."""
    own = ["--container", "image.sqsh", "--nodes", "1", "--dry-run", "--", "sft"]
    assert slurm.main([*own, "--model", "Qwen/Qwen3-4B", "--data", "x.jsonl"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if " megatron_profit sft " in x)
    assert line.split()[:3] == ["env", "--unset=RANK", "python"]
    words = [*line.split()[:2], "sh", "-c", "echo ${RANK-none}"]
    environment = {**os.environ, "RANK": "1"}
    assert subprocess.check_output(words, env=environment, text=True) == "none\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--container", "i", "--mount", "/a,b"], "neither comma, colon nor space"),
        (["--container", "i", "--mount", "/"], "is not /"),
        (["--mount", "/a"], "--mount is about --container, which is missing"),
        (["--cpus-per-task", "0"], "--cpus-per-task is 0; it must be at least 1"),
        (["--max-restarts", "-1"], "--max-restarts is -1; it must be at least 0"),
    ],
)
def test_values_that_no_job_can_have_are_one_line(cluster, capsys, words, message):
    assert slurm.main([*words, "--dry-run", *JOB]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_spaces_and_signs_is_one_value(cluster, capsys):
    """Slurm reads the lines of its options with a shell's quotes, and replaces %j and the like."""
    words = [*JOB[:-1], "runs/my 50%a run"]
    assert slurm.main(["--dry-run", *words]) == 0
    text = capsys.readouterr().out
    options = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert all(len(words) == 1 for words in options)
    assert ["--output=runs/my 50%%a run/job-%j.log"] in options
    assert ["--job-name=my 50%a run"] in options
    assert "sbatch 'runs/my 50%a run/job.sbatch'\n" in text


def test_a_folder_whose_name_would_end_a_line_of_the_script_is_refused(cluster, capsys):
    assert slurm.main(["--dry-run", *JOB[:-1], "a\nrm -r b"]) == 2
    assert "a job's script cannot name such a folder" in capsys.readouterr().err


def test_restarts_are_the_jobs(cluster, capsys):
    assert slurm.main([*JOB, "--max-restarts", "5"]) == 2
    assert "--max-restarts follows from the job" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--overwrite", "--ckpt-step=3"])
def test_what_a_job_that_starts_again_would_repeat_is_refused(cluster, capsys, flag):
    assert slurm.main([*JOB, flag]) == 2
    assert "would act again each time that the job is started again" in capsys.readouterr().err


def test_checkpoints_that_a_job_which_starts_again_would_not_load_are_refused(cluster, capsys):
    assert slurm.main([*JOB, "--load", "other", "--finetune"]) == 2
    assert "start from there with --pretrained-checkpoint other" in capsys.readouterr().err
    assert slurm.main(["--dry-run", *JOB, "--load", "runs/big/checkpoints"]) == 0
    capsys.readouterr()
    assert slurm.main([*JOB, "--without=--load"]) == 2
    assert "could not go on with them; drop it" in capsys.readouterr().err
    assert slurm.main(["--dry-run", *JOB, "--load", "other", "--without=--save"]) == 0


@pytest.mark.parametrize(
    ("model", "more", "before_the_limit", "to_end"),
    [
        ("Qwen/Qwen3-32B", [], 1338, 1038),  # 459 GB
        ("Qwen/Qwen3-32B", ["--lora-rank", "8"], 600, 300),
        ("Qwen/Qwen3-0.6B-Base@v1", [], 600, 300),
        ("somebody/unknown", [], 600, 300),
    ],
)
def test_the_last_checkpoint_has_the_time_that_its_size_takes(
    cluster, capsys, model, more, before_the_limit, to_end
):
    command = ["--", "sft", "--model", model, "--data", "chats.jsonl", *more]
    assert slurm.main(["--dry-run", "--nodes", "2", *command]) == 0
    text = capsys.readouterr().out
    assert f"#SBATCH --signal=B:USR1@{before_the_limit}\n" in text
    assert f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{to_end}}}\n" in text


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("2-0:0:1", 172801),
    ],
)
def test_times_are_read_as_slurm_reads_them(time, seconds):
    assert slurm._seconds(time) == seconds


def test_the_signal_leaves_half_of_a_short_job_to_the_training(cluster, capsys):
    command = ["--", "sft", "--model", "Qwen/Qwen3-0.6B", "--data", "chats.jsonl"]
    assert slurm.main(["--dry-run", "--nodes", "2", "--time", "9:59", *command]) == 2
    assert "--time 9:59 is too short" in capsys.readouterr().err
    for time, before_the_limit in (("10", 300), ("15", 450), ("20", 600), ("0", 600)):
        assert slurm.main(["--dry-run", "--nodes", "2", "--time", time, *command]) == 0
        assert f"--signal=B:USR1@{before_the_limit}\n" in capsys.readouterr().out


def test_a_models_own_folder_says_how_large_its_checkpoint_is(cluster, capsys):
    folder = cluster / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config("Qwen3-32B")))
    command = ["--", "sft", "--model", "mine", "--data", "chats.jsonl"]
    assert slurm.main(["--dry-run", "--nodes", "2", *command]) == 0
    assert "#SBATCH --signal=B:USR1@1338\n" in capsys.readouterr().out


def test_each_gpu_has_cores(cluster, capsys):
    assert slurm.main(["--dry-run", "--gpus-per-node", "4", *JOB]) == 0
    assert "#SBATCH --cpus-per-task=32\n" in capsys.readouterr().out


def test_without_slurm_the_message_says_how_to_see_the_script(cluster, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.main(JOB) == 2
    assert "print the script with --dry-run" in capsys.readouterr().err
