"""The upload of an export, against a server of this test that answers as the hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.model_card.base import HubId
from checkpoint_conversion.model_card.hub import check_upload, upload


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        private: Whether a repository is private, by id.
        files: Content of each file that was committed.
        status: Answer to everything, where it is no success.
        refuses: End of a path that is refused.
    """

    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    refuses: str = "no path"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"error": "refused"}
        path = path.partition("?")[0]
        if path.endswith(self.refuses):
            return 400, {"error": "out of order"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return 200, {"files": modes}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": f"https://huggingface.co/{repo}/commit/1",
                "commitOid": "1",
                "pullRequestUrl": None,
            }
        if repo not in self.private:
            return 404, {"error": "not here"}
        return 200, {"id": repo, "private": self.private[repo], "siblings": [], "sha": "0"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        status = 409 if repo in self.private else 200
        self.private.setdefault(repo, private)
        return status, {"url": f"https://huggingface.co/{repo}", "id": repo}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = state.answer(self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / ".checkpoint_conversion.json").write_text("{}")
    return folder


def test_a_new_repository_is_private_and_gets_the_export_without_hidden_files(hub, export):
    assert check_upload("me/model") == "me/model"
    assert hub.private == {"me/model": True}
    assert upload(export, "me/model").endswith("/me/model")
    assert hub.files.keys() == {"README.md", "model.safetensors"}
    assert hub.files["model.safetensors"] == b"weights"


def test_uploaded_adapters_name_their_base_on_the_hub(hub, export):
    """A folder of this machine tells nobody else which model the adapters belong to."""
    options = {"base_model_name_or_path": "/home/me/base", "r": 4}
    (export / "adapter_config.json").write_text(json.dumps(options))
    (export / "additional_chat_templates").mkdir()
    (export / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    check_upload("me/adapters")
    upload(export, "me/adapters", HubId("Qwen/Qwen3-4B", "1cfa9a7"))
    template = "additional_chat_templates/tool_use.jinja"
    assert hub.files.keys() == {"README.md", "model.safetensors", "adapter_config.json", template}
    assert json.loads(hub.files["adapter_config.json"]) == {
        "base_model_name_or_path": "Qwen/Qwen3-4B",
        "r": 4,
        "revision": "1cfa9a7",
    }
    assert json.loads((export / "adapter_config.json").read_text()) == options
    upload(export, "me/adapters", HubId("Qwen/Qwen3-4B"))
    assert "revision" not in json.loads(hub.files["adapter_config.json"])
    hub.refuses = "/preupload/main"
    with pytest.raises(ConversionError, match=r"change .* to Qwen/Qwen3-4B, and upload it with"):
        upload(export, "me/adapters", HubId("Qwen/Qwen3-4B"))


def test_a_name_without_an_owner_is_the_tokens(hub):
    assert check_upload("model") == "me/model"
    assert check_upload("team/model", public=True) == "team/model"
    assert hub.private == {"me/model": True, "team/model": False}


def test_a_repository_that_everybody_reads_needs_a_word(hub):
    hub.private["me/model"] = False
    with pytest.raises(
        ConversionError, match="everybody can read this repository; give --push-public"
    ):
        check_upload("me/model")
    assert check_upload("me/model", public=True) == "me/model"


def test_a_private_repository_is_not_taken_for_a_public_one(hub):
    hub.private["me/model"] = True
    with pytest.raises(ConversionError, match="this repository is private, and --push-public"):
        check_upload("me/model", public=True)
    assert hub.private == {"me/model": True}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the hub does not know the token"),
        (403, "the token may not write there"),
        (500, "the hub answers"),
    ],
)
def test_the_hubs_refusals_are_one_line(hub, status, message):
    hub.status = status
    with pytest.raises(ConversionError, match=f"--push-to-hub me/model: {message}") as refused:
        check_upload("me/model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "a/b/c", "me/model@main", "../x", "me/mo del"])
def test_what_is_no_id_is_refused_without_asking(name):
    with pytest.raises(ConversionError, match="write it as OWNER/NAME"):
        check_upload(name)


def test_without_token_or_network_the_message_says_what_to_do(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConversionError, match="no token of the hub; `hf auth login`"):
        check_upload("me/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConversionError, match="HF_HUB_OFFLINE is set; unset it"):
        check_upload("me/model")
    assert hub.private == {}


def test_an_upload_that_fails_leaves_the_export_and_says_how_to_go_on(hub, export):
    check_upload("me/model")
    hub.refuses = "/preupload/main"
    with pytest.raises(ConversionError, match=r"upload it with: hf upload me/model .*/hf$"):
        upload(export, "me/model")
    assert (export / "model.safetensors").read_bytes() == b"weights"
