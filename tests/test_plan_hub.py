"""Names on the Hugging Face hub: huggingface_hub asks a server of ours in its place."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from command import multimatrix
from multimatrix.errors import InputError
from multimatrix.plan import sources
from multimatrix.plan.sources import from_place
from plan_cases import CONFIGS, write_config

CONFIG = json.dumps(CONFIGS["llama"]).encode()
# What the hub answers where there is no file: status and X-Error-Code.
FAILURES = {"gated": (403, "GatedRepo"), "empty": (404, "EntryNotFound"), "broken": (500, "")}
CODE = """
import sys
from multimatrix.errors import InputError
from multimatrix.plan.sources import from_place
for name in sys.argv[1:]:
    try:
        sizes = from_place(name)
        print(sizes.name, sizes.source, sizes.parameters)
    except InputError as error:
        print(error)
assert "torch" not in sys.modules
"""


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        owner = self.path.split("/")[1]
        found = self.path == "/some-one/llama.x/resolve/main/config.json"
        status, code = (200, "") if found else FAILURES.get(owner, (401, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(CONFIG) if found else 0))
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(CONFIG)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def ask(tmp_path):
    """What is said of names, and with what on stderr: (lines, stderr)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def lines(*names: str, **environment: str) -> tuple[list[str], str]:
        here = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-c", CODE, *names]
        environment = os.environ | here | environment
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
        return done.stdout.splitlines(), done.stderr

    yield lines
    server.shutdown()
    thread.join()
    server.server_close()


def test_names_are_looked_up(ask, tmp_path):
    names = ("some-one/llama.x", "gated/x", "empty/x", "nobody/x", "broken/x", "a--b/c")
    (found, gated, empty, nobody, broken, impossible), err = ask(*names)
    parameters = sources.from_fields(CONFIGS["llama"], name="", source="").parameters
    assert found == f"llama.x some-one/llama.x {parameters}"
    assert "hf auth login" in gated
    assert "has no config.json" in empty
    assert "there is no nobody/x" in nobody
    assert "cannot be asked for it" in broken
    assert "500" in broken
    assert "no name that the hub allows" in impossible
    assert err == ""
    # Out of reach, what was fetched is still known, and nobody waits.
    started = time.monotonic()
    (known, unknown), err = ask("some-one/llama.x", "nobody/x", HF_ENDPOINT="http://127.0.0.1:9")
    assert known == found
    assert "cannot be asked for it" in unknown
    assert err == ""
    assert time.monotonic() - started < 15
    (known, unknown), _ = ask("some-one/llama.x", "nobody/x", HF_HUB_OFFLINE="1")
    assert known == found
    assert "cannot be asked for it" in unknown


def test_what_lies_here_is_not_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "hub_config", lambda name: pytest.fail(f"asked for {name}"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "someone" / "llama"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"no config\.json"):
        from_place("someone/llama")
    write_config(folder, CONFIGS["llama"])
    for place in ("someone/llama", "someone/llama/config.json"):
        assert from_place(place).name == "llama"
    for place in ("nowhere", "a/b/c", "/a", "./a", "../a", "~/a", "a b/c", "a/"):
        with pytest.raises(InputError, match="folder"):
            from_place(place)


def test_the_command_asks_the_hub(monkeypatch, tmp_path):
    file = write_config(tmp_path, CONFIGS["llama"] | {"novel_gate": 1})
    monkeypatch.setattr(sources, "hub_config", lambda name: file)
    done = multimatrix("plan", "some-one/llama", "--json")
    row = json.loads(done.out)
    assert (row["model"], row["source"]) == ("llama", "some-one/llama")
    assert done.err == "warning: llama: not read, and may change what is counted: novel_gate\n"
    write_config(tmp_path, CONFIGS["llama"] | {"hidden_size": 0})
    assert multimatrix("plan", "some-one/llama").sentence.startswith("multimatrix: some-one/llama has hidden_size = 0")
