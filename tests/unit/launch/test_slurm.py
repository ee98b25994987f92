"""The job of `megatron-profit slurm`: a script that bash understands, submitted or printed."""

from __future__ import annotations

import os
import subprocess

import pytest

from megatron_profit.launch import slurm

JOB = [
    *("--nodes", "2", "--partition", "gpu", "--time", "1-0", "--sbatch=--qos=high"),
    *("--", "sft", "--model", "Qwen/Qwen3-32B", "--data", "my chats.jsonl", "--run", "runs/big"),
]
STUBS = {
    # Like a job of many nodes: a reader of the first line alone must not end the writer.
    "scontrol": "echo node-a\nseq -f node-%g 20000",
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
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": "2",
    }
    started = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    words = started.stdout.split("|")
    assert words[1:4] == ["-m", "megatron_profit", "sft"]
    assert words[4:-1] == [
        *("--model", "Qwen/Qwen3-32B", "--data", "my chats.jsonl", "--run", "runs/big"),
        *("--nnodes", "2", "--rdzv-id", "12345", "--rdzv-endpoint", "node-a:22345"),
    ]


def test_without_slurm_the_message_says_how_to_see_the_script(cluster, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.main(JOB) == 2
    assert "print the script with --dry-run" in capsys.readouterr().err
