"""`diffmm app`: its messages, and its end. The page itself is tested in `tests/app`."""

import os
import signal
import sys
import threading
from contextlib import closing

import pytest

from diffmm.app import server
from diffmm.models import BackboneConfig, ImageConfig, ImageModel, TextConfig, TextModel
from diffmm.models.job import Job, text_reader
from diffmm.models.weights import save_model

BACKBONE = BackboneConfig(dim=32, depth=1, num_heads=4, rope="1d")


@pytest.fixture
def decoder(tmp_path):
    """Weights of a decoder of bytes."""
    model = TextModel(TextConfig(vocab_size=259, max_length=16, backbone=BACKBONE))
    model.job = Job(reader=text_reader("bytes"))
    return save_model(model, tmp_path / "decoder").parent


def test_without_gradio_it_says_how_to_install_it(run, decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("app", decoder, "--port", "0")
    assert result.code == 2
    (mistake,) = result.mistakes
    assert mistake.startswith("the page needs Gradio (")
    assert mistake.endswith("): pip install diffmm[app]")


def test_ctrl_c_ends_it_quietly(run, decoder, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio")
    make_server = server.make_server

    def interrupted(*arguments):
        made = make_server(*arguments)

        def interrupt():
            while not made.started:
                stop.wait(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        return made

    stop = threading.Event()
    monkeypatch.setattr(server, "make_server", interrupted)
    result = run("app", decoder, "--port", "0", "--device", "cpu")
    assert (result.code, result.err) == (130, "")
    assert result.out.startswith("http://127.0.0.1:")
    assert result.out.endswith("/ (Ctrl-C ends it)\n")


def test_mistakes(run, decoder, tmp_path):
    config = ImageConfig(backbone=BackboneConfig(32, 1, 4, rope="2d"), image_size=16)
    encoder = save_model(ImageModel(config), tmp_path / "encoder").parent
    with closing(server.listener(0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (("nowhere",), "there is no file of weights at nowhere"),
            ((encoder,), f"{encoder} contains an ImageModel, which answers nothing"),
            (
                (decoder, "--port", port),
                f"port {port} of 127.0.0.1 cannot be used: Address already",
            ),
            ((decoder, "--port", "70000"), "port 70000 of 127.0.0.1 cannot be used: it must be in"),
            ((decoder, "--device", "cuda:99"), "device 'cuda:99' is not available"),
        ):
            result = run("app", *arguments)
            assert result.code == 2
            (mistake,) = result.mistakes
            assert mistake.startswith(message)
