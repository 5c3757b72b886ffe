"""The command that serves runs over HTTP."""

import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.options import Compile, Faster, Optimize, Precision, speed_of

if TYPE_CHECKING:
    from tokendial.serve.scheduling.engine import Engine
    from tokendial.serve.settings import Settings
    from tokendial.serve.workers.facts import Facts

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


@app.command(rich_help_panel=USE_PANEL)
def serve(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folder of a run, or NAME=FOLDER; one backbone."),
    ],
    slo_ms: Annotated[
        float | None,
        typer.Option(help="Answer within so many ms [default: 100, or what the model needs here]."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; the default is this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 8000,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(help="A name that clients may call the server by, besides its own; repeat."),
    ] = None,
    degree: Annotated[
        int | None, typer.Option(help="One degree for all, instead of what the load allows.")
    ] = None,
    max_degree: Annotated[int | None, typer.Option(help="The last degree to offer.")] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="The least accuracy, as `tokendial eval` found it.")
    ] = None,
    compensator: Annotated[
        str | None, typer.Option(help="Folder of a compensator that turns with the dial.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most images that run together.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a batch may wait for more images.")
    ] = 2.0,
    max_queue: Annotated[int, typer.Option(help="Most images that may wait.")] = 512,
    optimize: Optimize = False,
    compile: Compile = False,
    precision: Faster = Precision.fp32,
    threads: Annotated[int | None, typer.Option(help="Threads of the model.")] = None,
    spare: Annotated[
        bool,
        typer.Option(help="On a GPU or with --optimize: keep a second model process ready."),
    ] = True,
    decoders: Annotated[int, typer.Option(help="Processes that decode images.")] = 3,
    max_decode_s: Annotated[
        float, typer.Option(help="Most seconds of a processor to decode an image.")
    ] = 4.0,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File with one API key a line; or TOKENDIAL_API_KEYS, by commas."),
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Most bytes of a request.")] = 10 * 2**20,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of an image.")] = 50_000_000,
    max_images: Annotated[int, typer.Option(help="Most images of a request.")] = 32,
    max_memory: Annotated[
        int, typer.Option(help="Most bytes of requests and masks held at a time.")
    ] = 512 * 2**20,
    max_connections: Annotated[int, typer.Option(help="Most requests at a time.")] = 256,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds to send a request, or to answer the last ones.")
    ] = 30.0,
    ray: Annotated[
        bool, typer.Option("--ray", help="On a Ray cluster: that of RAY_ADDRESS, or this machine.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: copies of the model.")] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: add copies as the load asks for, up to this."),
    ] = None,
    home: Annotated[
        int, typer.Option(min=0, help="With --ray: the degree at which copies shall bear the load.")
    ] = 0,
) -> None:
    """Serve runs over HTTP; the dial turns by itself, so that answers keep coming in time."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"serving needs {', '.join(missing)}, which is not installed: "
            "pip install 'tokendial[serve]'."
        )
    from tokendial.serve.http.server import bound_socket
    from tokendial.serve.settings import Settings, check_settings, read_keys, readable_by_others

    folders = _named(runs)
    # Each option has the name of its setting, which says what is allowed.
    told = {name: value for name, value in context.params.items() if name in Settings.model_fields}
    told["allowed_hosts"] = told["allowed_hosts"] or ()
    if slo_ms is None:
        del told["slo_ms"]  # chosen when it is known what an image takes
    speed = speed_of(optimize, compile, precision)
    settings = check_settings(told | {"speed": speed, "api_keys": read_keys(api_keys)})
    if api_keys is not None and readable_by_others(api_keys):
        print(f"api_keys: every user of this machine can read {api_keys}.", file=sys.stderr)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    # Clients' mistakes; they are told.
    for name in ("uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray:
        _serve_on_ray(folders, settings, replicas, max_replicas, home)
        return
    if (replicas, max_replicas, home) != (1, None, 0):
        raise ValueError("replicas, max_replicas and home are for --ray.")
    with bound_socket(settings) as listener:  # a mistake here is told before what takes long
        _serve(folders, settings, listener)


def _serve(folders: dict[str, Path], settings: "Settings", listener: socket.socket) -> None:
    from tokendial.serve.http.app import create_app
    from tokendial.serve.http.server import Server, address_of, exposed
    from tokendial.serve.starting import started
    from tokendial.serve.workers.decoding import DecoderPool

    with closing(DecoderPool(settings)) as decoders:  # they load while the models do
        served, engine, settings = started(folders, settings)
        with closing(served):
            offered = served.facts.ladder(settings.max_degree, settings.min_accuracy)
            _print_degrees(served.facts, engine, offered)
            print(f"answers within {settings.slo_ms:g} ms")
            if exposed(listener, settings):
                told = f"whoever reaches {settings.host} may ask: there are no API keys."
                print(told, file=sys.stderr)

            def ready() -> None:
                print(
                    f"serving {', '.join(served.facts.names)} on {address_of(listener)}", flush=True
                )

            def reload() -> None:
                changed = served.reload(engine.call)
                print(f"read anew: {', '.join(changed) or 'nothing has changed'}", flush=True)

            application = create_app(engine, served, settings, decoders)
            server = Server(application, engine, settings, ready=ready, reload=reload)
            server.run(sockets=[listener])


def _serve_on_ray(
    folders: dict[str, Path],
    settings: "Settings",
    replicas: int,
    max_replicas: int | None,
    home: int,
) -> None:
    if find_spec("ray") is None:
        raise ValueError("ray: serving on Ray needs: pip install 'tokendial[serve,ray]'.")
    from tokendial.serve.ray.cluster import serve_on_ray
    from tokendial.serve.ray.on_ray import Deployed

    # Replicas do not run where the command was given.
    runs = {name: folder.resolve() for name, folder in folders.items()}
    if settings.compensator:
        compensator = str(Path(settings.compensator).resolve())
        settings = settings.model_copy(update={"compensator": compensator})
    deployed = Deployed(
        runs=runs, settings=settings, replicas=replicas, max_replicas=max_replicas, home=home
    )

    def ready() -> None:
        names = ", ".join(runs)
        print(f"serving {names} on Ray at http://{settings.host}:{settings.port}", flush=True)

    serve_on_ray(deployed, ready)


def _print_degrees(facts: "Facts", engine: "Engine", degrees: Sequence[int]) -> None:
    """What each degree costs here, and what it is worth."""
    for name in facts.names:
        title = name if len(facts.names) > 1 else None
        table = Table("degree", "GMACs", "ms per image", "accuracy", title=title)
        for degree in degrees:
            accuracy = facts.accuracy(name, degree)
            table.add_row(
                str(degree),
                f"{facts.gmacs(name, degree):.4f}",
                f"{1000 * engine.seconds(name, degree):.2f}",
                "" if accuracy is None else f"{accuracy:.2%}",
            )
        Console().print(table)


def _named(texts: list[str]) -> dict[str, Path]:
    """Folders by name, of NAME=FOLDER, or FOLDER, which has its own."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():  # there are folders with such names
            name, folder = Path(text).resolve().name, text
        if not 0 < len(name) <= 100:
            raise ValueError(f"runs: a name has 1 to 100 letters, got {text!r}.")
        if name in folders:
            raise ValueError(f"runs: {name} is there twice; say NAME=FOLDER.")
        folders[name] = Path(folder)
    return folders
