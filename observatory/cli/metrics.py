"""``observatory metrics``: a run that is captured, for Prometheus and ClusterCockpit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import RunArgument

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_LOOPBACK = "127.0.0.1"
_SOCKET = "unix:"
#: A socket that takes nothing for so long is given up.
_SOCKET_S = 10.0


def metrics(
    run: RunArgument,
    *,
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, metavar="PORT", help="Serve Prometheus here."),
    ] = None,
    address: Annotated[
        str, typer.Option("--address", metavar="IP", help="Address of --port; 0.0.0.0 for all.")
    ] = _LOOPBACK,
    textfile: Annotated[
        Path | None,
        typer.Option(
            "--textfile",
            metavar="FILE",
            help="Write Prometheus' text here, for the collector of node_exporter.",
        ),
    ] = None,
    lines: Annotated[
        str | None,
        typer.Option(
            "--line-protocol",
            metavar="FILE|unix:SOCKET",
            help="Append ClusterCockpit's line protocol to a file, or send it to a socket.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=1.0, max=3600.0, metavar="SECONDS", help="Time between two looks.")
    ] = 15.0,
    steps: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Last steps of each phase.")
    ] = 50,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Publish what a run does now, until it ends: names and labels are in docs/run.md.

    Reads the newest files of the run directory, as `top` does; nothing is asked of the program.
    """
    from prometheus_client import CollectorRegistry, write_to_textfile

    from observatory.analysis.live import LiveView, live_view
    from observatory.cli.output import say
    from observatory.errors import ObservatoryError, RunError
    from observatory.interchange.exporters.live_metrics import RunCollector, line_protocol, live_samples

    if port is None and textfile is None and lines is None:
        raise RunError("there is no place to publish to", expected="--port, --textfile or --line-protocol")
    latest: LiveView | None = live_view(run, steps=steps)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(lambda: latest, run.name))
    if port is not None:
        _serve(registry, address, port)
        say(f"observatory: http://{address}:{port}/metrics")
    try:
        while True:
            if textfile is not None:
                with _one_sentence(str(textfile)):
                    write_to_textfile(str(textfile), registry)
            if lines is not None and latest is not None:
                at_s = time.time() if latest.ended_unix_s is None else latest.ended_unix_s
                text = line_protocol(live_samples(latest), run=run.name, unix_s=int(at_s))
                with _one_sentence(lines):
                    _send(lines, text)
            if once or (latest is not None and latest.state != "running"):
                return
            time.sleep(interval)
            try:
                latest = live_view(run, steps=steps)
            except ObservatoryError as error:  # a file that was replaced while it was read, say
                latest = None
                say(f"note: {error}")
    except KeyboardInterrupt:
        return


@contextlib.contextmanager
def _one_sentence(place: str) -> Iterator[None]:
    """An error of the system names the place that was given."""
    from observatory.errors import RunError
    from observatory.run.files import os_reason

    try:
        yield
    except OSError as error:
        raise RunError(f"{place} cannot be written ({os_reason(error)})") from error


def _send(place: str, text: str) -> None:
    import socket

    if not place.startswith(_SOCKET):
        with open(place, "a", encoding="utf-8") as file:
            file.write(text)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(_SOCKET_S)
        stream.connect(place.removeprefix(_SOCKET))
        stream.sendall(text.encode())


def _serve(registry: CollectorRegistry, address: str, port: int) -> None:
    from prometheus_client import start_http_server

    from observatory.errors import RunError
    from observatory.run.files import os_reason

    try:
        start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        raise RunError(
            f"port {port} of {address} cannot be opened ({os_reason(error)})", remedy="choose another"
        ) from error
