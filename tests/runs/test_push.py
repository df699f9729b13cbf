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
SAID = "You don't have the right of owner"  # by the Hub


class Hub:
    """What a client created and committed. files: by path, as they are after all commits. refused: the part
    of an address whose requests are answered with a status, or with the end of the connection."""

    def __init__(self) -> None:
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # of large files, by their digests
        self.tokens: set[str] = set()
        self.commits = self.uploads = 0
        self.refused: tuple[str, int | None] | None = None


class Handler(BaseHTTPRequestHandler):
    """create, validate-yaml, preupload, Git LFS's batch and upload, commit."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, body = self.hub, self._body()
        hub.tokens.add(self.headers.get("Authorization", ""))
        if self._is_refused():
            return
        if self.path == "/api/repos/create":
            hub.repositories.append(json.loads(body))
            self._answer({"url": f"{self._here}/owner/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [self._mode(one) for one in json.loads(body)["files"]]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [self._object(one) for one in json.loads(body)["objects"]]
            self._answer({"objects": objects, "transfer": "basic"})
        elif self.path.endswith("/commit/main"):
            hub.commits += 1
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            self._answer({"commitUrl": f"{self._here}/owner/name/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        digest = self.path.removeprefix("/stored/")
        content = self._body()
        if self._is_refused():
            return
        self.hub.uploads += 1
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.stored[digest] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": self.path}, 404)

    def _is_refused(self) -> bool:
        if self.hub.refused is None or self.hub.refused[0] not in self.path:
            return False
        status = self.hub.refused[1]
        if status is None:
            self.close_connection = True
        else:
            self._answer({"error": SAID}, status)
        return True

    def _object(self, one: dict[str, Any]) -> dict[str, Any]:
        """What is here already is not asked for."""
        if one["oid"] in self.hub.stored:
            return one
        return {**one, "actions": {"upload": {"href": f"{self._here}/stored/{one['oid']}", "header": {}}}}

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


@pytest.mark.parametrize(
    ("where", "status", "says"),
    [
        ("/repos/create", 401, ["401 Unauthorized", "check the token", "hf auth login"]),
        ("/repos/create", 403, ["403 Forbidden", "a token that may write there"]),
        ("/preupload/", 404, ["404 Not Found", "check the name"]),
        ("/stored/", 403, ["403 Forbidden", "a token that may write there"]),
        ("/commit/", 409, ["409 Conflict", "somebody else writes there"]),
        ("/commit/", 413, ["413 ", "check the name and the token"]),
        ("/commit/", 429, ["429 Too Many Requests", "wait"]),
        ("/commit/", 500, ["500 Internal Server Error", "the fault is the Hub's"]),
    ],
)
def test_a_refusal_is_one_line_in_the_words_of_the_hub(hub, student, cli, tmp_path, where, status, says):
    """Without the token, and with nothing of the student there."""
    hub.refused = where, status
    line = refuse(cli, tmp_path, "push", student, "owner/name", says=["could not be uploaded", SAID, *says])
    assert TOKEN not in line and line.count(SAID) == 1 and "http" not in line
    assert hub.files == {}


def test_a_push_that_was_cut_goes_on_with_what_is_missing(hub, student, cli, tmp_path):
    """The files are there all at once, and large ones are not sent a second time."""
    hub.refused = "/commit/", None
    refuse(cli, tmp_path, "push", student, "owner/name", says=["could not be uploaded", "push again"])
    assert (hub.files, hub.uploads, hub.commits) == ({}, 1, 0)
    hub.refused = None
    for again in (1, 2):
        assert cli("push", student, "owner/name").code == 0
        assert hub.files.keys() == on_disk(student).keys()
        assert (hub.uploads, hub.commits) == (1, again)


def test_no_path_of_this_machine_is_uploaded(hub, student, cli, tmp_path):
    """What is measured against, and by what, is called by its name alone; all else is as it was."""
    folder = shutil.copytree(student, tmp_path / "student")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    card = json.loads((folder / "diffkd.json").read_text())
    spec = {"kind": "images", "path": "/home/me/my_photos.d"}
    protocol = {
        "features": {"name": "inception"}, "samples": 9, "target": {"path": "/home/me/my_photos.d/run/s"},
        "reference": {"name": "/home/me/my_photos.d", "spec": spec},
        "evaluation": {"weights": "C:\\w\\x.pth"},
    }  # fmt: skip
    notes = ["/home/me/my_photos.d holds images of 2/3 sizes, each resized on its own"]
    card |= {
        "teacher": "/mnt/big/teacher", "classes": ["/m/01", "and/or"], "prompt": "/imagine a cat",
        "metrics": [{"steps": 4, "nfe": 4, "fid": 1.5, "protocol": protocol, "notes": notes}],
    }  # fmt: skip
    model_card.write(folder, card)
    assert cli("push", folder, "owner/name").code == 0
    sent = {name: content.decode() for name, content in hub.files.items() if name.endswith((".md", ".json"))}
    for name, text in sent.items():
        assert not any(place in text for place in ("/home", "/mnt", "C:", str(tmp_path))), name
    assert "| teacher | teacher |" in sent["README.md"] and "| my&#95;photos&#46;d |" in sent["README.md"]
    found = json.loads(sent["diffkd.json"])
    assert found["metrics"][0]["notes"] == ["my_photos.d holds images of 2/3 sizes, each resized on its own"]
    assert found["metrics"][0]["protocol"]["evaluation"]["weights"] == "x.pth"
    assert (found["classes"], found["prompt"]) == (card["classes"], card["prompt"])
    changed = {"teacher", "metrics"}
    assert {k: v for k, v in found.items() if k not in changed} == {
        k: v for k, v in card.items() if k not in changed
    }
    assert not any(name.startswith(".") for name in hub.files)


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
    del card["lora"]
    card |= {"export": {"kind": "single-file", "class": "FluxTransformer2DModel"}, "teacher": "runs/flux"}
    for base, said in (({}, True), ({"base_model": "owner/flux"}, False)):
        (folder / "diffkd.json").write_text(json.dumps({**card, **base}))
        code, _, err = cli("push", folder, "owner/name")
        assert code == 0 and ("by a path of this machine, runs/flux" in err) is said
