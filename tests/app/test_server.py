"""The server of the page: hosts, uploads, files and ports."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from diffmm.app import server
from diffmm.app.server import delete_old, listener, make_server, serve, upload_folder
from diffmm.recipes.errors import InputError

pytest.importorskip("gradio", reason="needs gradio")
pytestmark = [
    # Gradio 6.31 under pandas 3.
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting.*"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated.*"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with upload_folder() as created:
        yield created


@pytest.fixture
def client(classifier, folder) -> Iterator[httpx.Client]:
    """A client of the page of a classifier."""
    with closing(listener(0)) as at:
        started = make_server(classifier, folder)
        thread = threading.Thread(target=started.run, kwargs={"sockets": [at]})
        thread.start()
        address = f"http://127.0.0.1:{at.getsockname()[1]}"
        with httpx.Client(base_url=address, trust_env=False, timeout=10) as created:
            yield created
        started.should_exit = True
        thread.join()


def uploaded(client: httpx.Client, file: str) -> httpx.Response:
    with Path(file).open("rb") as opened:
        return client.post("/gradio_api/upload", files={"files": (Path(file).name, opened)})


def asked(client: httpx.Client, path: str) -> str:
    """The events of a question about a file, as the page asks it."""
    config = client.get("/config").json()
    (number,) = [each["id"] for each in config["dependencies"] if each["targets"]]
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, 1]
    body = {"data": data, "fn_index": number, "session_hash": "a"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    return client.get("/gradio_api/queue/data", params={"session_hash": "a"}).text


def test_only_names_of_the_loopback_address_are_answered(client):
    for name, code in (
        ("127.0.0.1", 200),
        ("localhost:80", 200),
        ("example.org", 400),
        ("127.0.0.1.example.org", 400),
    ):
        response = client.get("/", headers={"Host": name})
        assert response.status_code == code, name


def test_the_page_names_no_other_address_to_load_from(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert client.get("/theme.css").headers["content-security-policy"] == policy
    assert "googleapis" not in client.get("/theme.css").text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    for path in ("/docs", "/openapi.json", "/monitoring"):
        assert client.get(path).status_code in (403, 404), path


def test_an_upload_lies_in_the_folder_until_the_end(client, folder, picture, classifier):
    (path,) = uploaded(client, picture).json()
    assert folder in Path(path).parents
    answer = asked(client, path)
    assert '"success":true' in answer
    assert f"{100.0 * classifier.predict(picture).score:.1f}%" in answer
    assert client.get(f"/gradio_api/file={path}").status_code == 200


def test_other_files_are_neither_read_nor_sent(client, folder, picture, monkeypatch):
    def download(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("downloads")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", download)
    beside = f"{folder}/../{Path(picture).parent.name}/{Path(picture).name}"
    for path in (picture, beside, "/etc/hostname", "https://example.org/a.png"):
        assert client.get(f"/gradio_api/file={path}", follow_redirects=False).status_code != 200
        answer = asked(client, path)
        assert '"success":false' in answer, answer
        assert "tile" not in answer
    assert list(folder.rglob("*.png")) == []


def test_large_uploads_are_refused(client, folder, picture, monkeypatch):
    monkeypatch.setattr(server, "MAX_UPLOAD_BYTES", 1000)
    response = uploaded(client, picture)
    assert response.status_code == 413
    assert response.text == "An upload must have at most 1,000 bytes."
    chunks: Any = iter([b"--a\r\n", b"--a--\r\n"])
    kind = {"Content-Type": "multipart/form-data; boundary=a"}
    response = client.post("/gradio_api/upload", content=chunks, headers=kind)  # of no given size
    assert response.status_code == 413
    assert list(folder.rglob("*.png")) == []


def test_the_newest_uploads_are_kept(client, folder, tmp_path):
    for number in range(20):
        file = tmp_path / f"{number}.png"
        file.write_text(str(number))
        assert uploaded(client, str(file)).status_code == 200
    names = {path.name for path in folder.rglob("*.png")}
    assert names == {f"{number}.png" for number in range(4, 20)}


def test_files_are_deleted_by_age(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        os.utime(tmp_path / name / "file", (1000 - age, 1000 - age))
    delete_old(tmp_path, 2)
    assert sorted(path.parent.name for path in tmp_path.rglob("file")) == ["middle", "new"]
    delete_old(tmp_path, 5)
    assert len(list(tmp_path.rglob("file"))) == 2


def test_the_folder_is_removed_and_the_environment_as_before(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    with upload_folder() as created:
        (created / "file").write_text("a")
        assert os.environ["GRADIO_TEMP_DIR"] == str(created)
    assert not created.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "/before"
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with upload_folder():
        pass
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_ports(monkeypatch):
    with closing(listener(0)) as taken:
        name, port = taken.getsockname()
        assert name == "127.0.0.1"
        message = rf"port {port} of 127.0.0.1 cannot be used: Address already in use"
        with pytest.raises(InputError, match=message):
            listener(port)
        monkeypatch.setattr(server, "PORT", port)
        with closing(listener(None)) as next_one:
            assert port < next_one.getsockname()[1] < port + server.NUM_PORTS
        monkeypatch.setattr(server, "NUM_PORTS", 1)
        with pytest.raises(InputError, match=f"ports {port} to {port} of 127.0.0.1 cannot be used"):
            listener(None)
    for port in (-1, 65536):
        with pytest.raises(InputError, match=rf"port {port} .*: it must be in \[0, 65535\]"):
            listener(port)


def test_ctrl_c_ends_the_server_and_removes_the_folder(classifier, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[Any] = []

    def interrupt(address: str) -> None:
        def visit() -> None:
            seen.append(httpx.get(address, trust_env=False, timeout=30).status_code)
            seen.append(len(list(tmp_path.glob("diffmm_app_*"))))
            # While a browser waits for news.
            with socket.create_connection(
                (address[7:-1].split(":")[0], int(address[:-1].split(":")[-1]))
            ) as waiting:
                waiting.sendall(b"GET /gradio_api/heartbeat/a HTTP/1.1\r\nHost: localhost\r\n\r\n")
                waiting.recv(100)
                os.kill(os.getpid(), signal.SIGINT)
                waiting.settimeout(10)
                while waiting.recv(1000):
                    pass

        threading.Thread(target=visit).start()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        serve(classifier, 0, ready=interrupt)
    assert seen == [200, 1]
    assert list(tmp_path.glob("diffmm_app_*")) == []
    assert time.monotonic() - began < 15
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
