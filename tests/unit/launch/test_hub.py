"""Ids of the hub from a cache in its snapshot layout; the network is missing."""

from __future__ import annotations

import pytest

from megatron_profit.launch.hub import find_data, find_model, local_folder, parse_id
from megatron_profit.launch.prepare import prepare
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.request import read_request


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a model of two revisions, and two data sets."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def add(kind: str, repo: str, revision: str, commit: str, files: dict[str, str]) -> None:
        folder = tmp_path / "hub" / f"{kind}s--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        (folder / "blobs").mkdir(exist_ok=True)
        for name, text in files.items():
            blob = folder / "blobs" / f"{commit[:6]}{abs(hash(name))}"
            blob.write_text(text)
            link = folder / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)

    add("model", "some/model", "main", "a" * 40, {"config.json": "new"})
    add("model", "some/model", "v1", "b" * 40, {"config.json": "old"})
    record = '{"prompt": "a", "completion": "b"}\n'
    # Older data sets describe themselves in a JSON file next to the folder of their data.
    files = {"data/train-00000-of-00001.jsonl": record, "dataset_infos.json": "{}"}
    add("dataset", "some/chats", "main", "c" * 40, files)
    files = {"main/train.jsonl": record, "extra/train.jsonl": record, "README.md": "#"}
    add("dataset", "some/sets", "main", "d" * 40, files)
    return tmp_path


def test_a_model_is_found_in_the_cache_by_its_revision(cache):
    assert (find_model("some/model") / "config.json").read_text() == "new"
    assert (find_model("some/model@v1") / "config.json").read_text() == "old"
    assert (find_model("some/model@" + "b" * 40) / "config.json").read_text() == "old"


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_a_dry_run_downloads_no_weights(cache, monkeypatch, flag):
    """A laptop shows the layout of a cluster for a model that its disk does not hold."""
    asked = []

    def download(repo, allow_patterns, **_):
        asked.extend(allow_patterns)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    request = read_request(["--model", "Qwen/Qwen3-235B-A22B", "--data", "d.jsonl", *flag])
    with pytest.raises(LaunchError, match="the hub cannot be reached"):
        prepare(request)
    assert "*.json" in asked
    assert ("*.safetensors" in asked) == (not flag)


def test_a_folder_here_comes_before_an_id(cache):
    (cache / "some" / "model").mkdir(parents=True)
    assert str(find_model("some/model")) == "some/model"


def test_other_commands_take_ids_too(cache, monkeypatch):
    """evaluate, chat and compare; a folder that is not there keeps their own message."""
    assert local_folder("some/model@v1") == str(find_model("some/model@v1"))
    assert local_folder(str(cache / "absent")) == str(cache / "absent")
    monkeypatch.setenv("HOME", str(cache))
    assert local_folder("~/model") == str(cache / "model")
    with pytest.raises(LaunchError, match="MODEL some/modl: there is no such folder here"):
        local_folder("some/modl")


def test_chat_templates_of_an_inner_folder_are_downloaded_and_other_weights_are_not(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "original/model.safetensors", "onnx/config.json"]
    files += ["additional_chat_templates/tool_use.jinja", "modeling.py", "metal/LICENSE"]
    patterns = {}

    def download(repo, **options):
        patterns.update({name: options[name] for name in ("allow_patterns", "ignore_patterns")})
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(LaunchError, match="the hub cannot be reached"):
        find_model("some/thing")
    found = list(filter_repo_objects(files, **patterns))
    assert found == [files[0], files[1], "additional_chat_templates/tool_use.jinja"]


def test_every_ending_that_is_read_is_downloaded(monkeypatch):
    asked = []

    def download(repo, allow_patterns, **options):
        asked.extend(allow_patterns)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(LaunchError, match="the hub cannot be reached"):
        find_data("some/chats")
    assert {"*.jsonl.zst", "*.csv.gz", "*.parquet", "*.arrow"} <= set(asked)


def test_data_are_the_folder_that_holds_the_files(cache):
    assert find_data("some/chats").endswith("c" * 40 + "/data")
    assert find_data("some/sets/extra").endswith("d" * 40 + "/extra")
    with pytest.raises(LaunchError, match="name one, such as some/sets/extra, some/sets/main"):
        find_data("some/sets")


@pytest.mark.parametrize("name", ["chats.jsonl", "data/chats.json.gz", "/tmp/x.parquet", "chats"])
def test_a_name_like_a_file_is_a_file(cache, name):
    assert find_data(name) == name


def test_what_is_not_there_names_the_download_and_a_name_that_is_near(cache):
    with pytest.raises(LaunchError) as error:
        find_model("some/modl@v1")
    message = str(error.value)
    assert "did you mean some/model?" in message
    assert "`hf download some/modl --revision v1`" in message
    assert "HF_HUB_OFFLINE is set" in message
    with pytest.raises(LaunchError, match="hf download some/other --repo-type dataset"):
        find_data("some/other")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Qwen/Qwen3-0.6B@refs/pr/1", ("Qwen/Qwen3-0.6B", "", "refs/pr/1")),
        ("gpt2", ("gpt2", "", None)),
        ("openai/gsm8k/main", ("openai/gsm8k", "main", None)),
        ("https://huggingface.co/Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", "", None)),
        ("https://huggingface.co/Qwen/Qwen3-4B/", ("Qwen/Qwen3-4B", "", None)),
        ("huggingface.co/Qwen/Qwen3-4B/tree/v1", ("Qwen/Qwen3-4B", "", "v1")),
        ("hf.co/datasets/openai/gsm8k/tree/main/socratic", ("openai/gsm8k", "socratic", "main")),
        ("hf://datasets/openai/gsm8k", ("openai/gsm8k", "", None)),
        ("https://example.com/Qwen/Qwen3-4B", None),
        ("../model", None),
        ("/model", None),
        ("a b", None),
    ],
)
def test_ids_are_told_from_paths(name, parts):
    found = parse_id(name, "model")
    assert (found and (found.repo, found.inner, found.revision)) == parts
