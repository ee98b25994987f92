"""Evaluation through a real OpenAI-compatible server, which transformers starts on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from make_tiny_model import make_tiny_model

from megatron_profit.commands import evaluate

REPOSITORY = Path(__file__).resolve().parents[2]
for name in ("lm_eval", "math_verify", "fastapi", "uvicorn", "openai"):
    pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def model(tmp_path):
    data = sorted((REPOSITORY / "examples" / "data").glob("*.jsonl"))
    return make_tiny_model(tmp_path / "tiny", data)


@pytest.fixture
def server(model, tmp_path):
    """The base URL of `transformers serve` with the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its console script asks for a home folder and a network; the module needs neither.
    start = "from transformers.cli.transformers import main; main()"
    flags = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (tmp_path / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", start, *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail((tmp_path / "server.log").read_text()[-3000:])
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


@pytest.mark.slow
def test_a_server_gives_the_answers_of_this_process(server, model, tmp_path):
    file = tmp_path / "sums.jsonl"
    questions = [{"question": f"What is two plus {n}?", "answer": n} for n in ("two", "six")]
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    flags = ["--task-file", str(file), "--max-new-tokens", "8"]
    out = tmp_path / "out"
    served = ["--server", server, "--concurrency", "1"]
    assert evaluate.main([f"served={model}", *flags, *served, "--out", str(out / "1")]) == 0
    here = ["--dtype", "float32"]
    assert evaluate.main([f"here={model}", *flags, *here, "--out", str(out / "2")]) == 0
    texts = [
        [
            json.loads(line)["samples"][0]["text"].strip()
            for line in path.read_text().splitlines()[1:]
        ]
        for path in (out / "1/served/sums.jsonl", out / "2/here/sums.jsonl")
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])
