"""The server of the page: on the loopback address only, with uploads in a temporary folder."""

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from diffmm.hub.trained import TrainedModel
from diffmm.recipes.errors import InputError

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
"""Host names that requests may have. A site that resolves its own name to the loopback address
could otherwise use the page through the user's browser (DNS rebinding)."""

PORT = 7860
"""Default port; if it is taken, the first free one of the next `NUM_PORTS`."""
NUM_PORTS = 100

MAX_UPLOAD_BYTES = 2**28
"""Maximum size of an upload: a quarter of a GiB, as of the largest image in color."""

MOST_FILES = 16
"""Number of uploaded files that are kept; older ones are deleted."""

UPLOADS = "/gradio_api/upload"

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
"""What the browser may load for the page: nothing from other addresses."""


def serve(
    trained: TrainedModel, port: int | None, *, ready: Callable[[str], object] = print
) -> None:
    """Serve the page of a model until the process is interrupted.

    Args:
        trained: The model.
        port: Port on the loopback address, 0 for any free one; None for `PORT` or the next free
            one.
        ready: Called with the address of the page.

    Raises:
        InputError: If Gradio is not installed, or the port cannot be used.
        ValueError: If the page has no panel for the model.
    """
    with upload_folder() as folder, closing(listener(port)) as at:
        server = make_server(trained, folder)
        ready(f"http://{LOOPBACK}:{at.getsockname()[1]}/")
        server.run(sockets=[at])


def make_server(trained: TrainedModel, folder: Path) -> Any:
    """Create the server (`uvicorn.Server`) of the page of a model.

    Args:
        trained: The model.
        folder: Folder for uploads, of `upload_folder`.

    Raises:
        InputError, ValueError: As `serve`.
    """
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the page needs Gradio ({error}): pip install diffmm[app]") from error
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from diffmm.app.page import make_page, theme_of

    # Gradio has read its variable for it when it was imported.
    gradio.routes.DEFAULT_TEMP_DIR = str(folder)
    no_docs: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**no_docs)

    def build() -> None:
        page = make_page(gradio, trained, folder)
        gradio.mount_gradio_app(
            app,
            page.blocks,
            path="/",
            app_kwargs=dict(no_docs),
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            show_error=False,
            max_file_size=MAX_UPLOAD_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme_of(gradio),
            head=page.head,
        )

    in_event_loop(build)
    app.add_middleware(Guard, folder=folder)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=1
        )
    )


def in_event_loop(function: Callable[[], None]) -> None:
    """Call a function while an event loop runs. Gradio creates locks with a page, and without a
    loop it would create loops for them that it never closes."""

    async def called() -> None:
        function()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(called())
    else:
        function()


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A temporary folder in which Gradio keeps uploaded files; it is removed at the end."""
    name = "GRADIO_TEMP_DIR"  # Gradio's only setting for it
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="diffmm_app_", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def listener(port: int | None) -> socket.socket:
    """A listening socket on the loopback address. Arguments and errors as in `serve`."""
    ports = range(PORT, PORT + NUM_PORTS) if port is None else [port]
    fault = ""
    for number in ports:
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((LOOPBACK, number))
            found.listen()
        except (OSError, OverflowError) as error:
            found.close()
            fault = getattr(error, "strerror", None) or "it must be in [0, 65535]"
            continue
        return found
    which = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    raise InputError(f"{which} of {LOOPBACK} cannot be used: {fault}")


def delete_old(folder: Path, keep: int) -> None:
    """Delete all files in a folder, at any depth, except the `keep` newest."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in files[: max(0, len(files) - keep)]:
        path.unlink(missing_ok=True)


class Guard:
    """Limits the size and the number of uploads, and what the browser loads for the page.

    Args:
        app: The application (ASGI).
        folder: Folder of the uploads.
    """

    def __init__(self, app: Any, folder: Path) -> None:
        self.app = app
        self.folder = folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].rstrip("/") == UPLOADS:
            from starlette.responses import PlainTextResponse

            size = dict(scope["headers"]).get(b"content-length", b"")
            if not size.isdigit() or int(size) > MAX_UPLOAD_BYTES:
                line = f"An upload must have at most {MAX_UPLOAD_BYTES:,} bytes."
                await PlainTextResponse(line, 413)(scope, receive, send)
                return
            delete_old(self.folder, MOST_FILES - 1)

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
