"""`diffkd push`, against a stand-in of the Hub's API on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from diffkd.models import loading, saving
from diffkd.runs.reports import card_calls, model_card
from tests.refusals import refuse

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
TOKEN = "hf_" + "aBcD1234" * 4


class Hub:
    """What a client created and committed. files: by path, as they are after all commits. status: with which
    everything is answered, None as the Hub does."""

    def __init__(self) -> None:
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # of large files, by their digests
        self.tokens: set[str] = set()
        self.status: int | None = None


class Handler(BaseHTTPRequestHandler):
    """create, validate-yaml, preupload, Git LFS's batch and upload, commit."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, body = self.hub, self._body()
        hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.status is not None:
            self._answer({"error": "Invalid credentials in Authorization header"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.repositories.append(json.loads(body))
            self._answer({"url": f"{self._here}/owner/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [self._mode(one) for one in json.loads(body)["files"]]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self._here}/stored/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"objects": objects, "transfer": "basic"})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            self._answer({"commitUrl": f"{self._here}/owner/name/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        digest = self.path.removeprefix("/stored/")
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.stored[digest] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": self.path}, self.hub.status or 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _mode(self, one: dict[str, Any]) -> dict[str, Any]:
        large = one["path"].endswith(".safetensors")
        return {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            self.hub.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.hub.files[value["path"]] = self.hub.stored[value["oid"]]

    @property
    def _here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """The Hub of this process, on a port of the system's choice; without Xet, whose client is no HTTP."""
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": made}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def student(tmp_path_factory, make_pipeline) -> Path:
    work = tmp_path_factory.mktemp("pushed")
    made = loading.load(make_pipeline(work))
    made.steps = 4
    saving.save(made, work / "student")
    model_card.write(work / "student", model_card.describe(made))
    return work / "student"


def on_disk(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_arrives_is_what_lies_on_the_disk(hub, student, cli):
    """Every file to the byte; of the card alone the place of the folder is that of the repository."""
    before = on_disk(student)
    outcome = cli("push", student, "owner/name")
    assert outcome.code == 0, outcome.stderr
    assert "is uploaded: http://127.0.0.1" in outcome.stdout.replace("\n", "")
    assert on_disk(student) == before
    card = before["README.md"].replace(card_calls.PLACE.encode(), b'"owner/name"')
    assert card != before["README.md"] and b"path/to" not in card
    assert hub.files == {**before, "README.md": card}
    (repository,) = hub.repositories
    assert (repository["organization"], repository["name"]) == ("owner", "name")
    assert "visibility" not in repository and "private" not in repository
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_private_repository_is_asked_for(hub, student, cli):
    assert cli("push", student, "owner/name", "--private").code == 0
    (repository,) = hub.repositories
    assert repository.get("visibility", "private" if repository.get("private") else None) == "private"


def test_a_card_of_files_downloads_them():
    from diffkd.runs.push import named

    written = named(f"```python\nimport torch\n\n{card_calls.FILES}\n```", "owner/name")
    assert 'import snapshot_download\n\nfolder = snapshot_download("owner/name")' in written


def test_bad_input_is_one_line(hub, student, cli, tmp_path, make_pipeline, monkeypatch):
    refuse(cli, tmp_path, "push", tmp_path / "none", "owner/name", says="is no folder")
    folder = make_pipeline(tmp_path)
    refuse(cli, tmp_path, "push", folder, "owner/name", says="is no student: it has no diffkd.json")
    for name in ("name", "a/b/c", "owner/na me", "owner/-x", "owner/a--b", "https://x.y/owner/name"):
        refuse(cli, tmp_path, "push", student, name, says=["is no name of a repository", "give owner/name"])
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    line = refuse(cli, tmp_path, "push", student, "owner/name", says="there is no token of the Hub")
    assert "hf auth login" in line and "HF_TOKEN" in line
    assert hub.repositories == [] and hub.tokens == set()


def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub, student, cli, tmp_path):
    hub.status = 401
    line = refuse(cli, tmp_path, "push", student, "owner/name", says=["could not be uploaded", "401"])
    assert TOKEN not in line and "hf auth login" in line


def test_a_network_that_is_gone_is_one_line(hub, student, cli, tmp_path, monkeypatch):
    with socket.socket() as taken:  # bound, so that nobody else is there, and never listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}"
        )
        refuse(cli, tmp_path, "push", student, "owner/name", says=["could not be uploaded", "the network"])


def test_a_base_that_only_this_machine_has_is_said(hub, student, cli, tmp_path):
    folder = shutil.copytree(student, tmp_path / "adapter")
    card = json.loads((folder / "diffkd.json").read_text())
    card["lora"] = {"base": "/home/me/base", "fingerprint": "0", "rank": 4, "targets": ["to_q"]}
    (folder / "diffkd.json").write_text(json.dumps(card))
    code, _, err = cli("push", folder, "owner/name")
    assert code == 0 and "names its base by a path of this machine, /home/me/base" in err
