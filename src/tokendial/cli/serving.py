"""The command `tokendial serve`. Most of its options are made from the server's `Settings`."""

import inspect
import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.options import (
    Compile,
    Optimize,
    PrecisionOption,
    RuntimeOption,
    runtime_for,
    runtime_of,
)

if TYPE_CHECKING:
    from tokendial.serve.scheduling.engine import Engine
    from tokendial.serve.settings import Settings
    from tokendial.serve.workers.catalog import ModelCatalog

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_MAX_NAME_LENGTH = 100
_OTHER_OPTIONS = ("runtime", "api_keys")
"""Settings whose options are written by hand: --runtime, --precision, --optimize and --compile
make the first one, and the file of --api-keys the second one."""
_TYPES: Mapping[str, Any] = {
    "integer": int,
    "number": float,
    "string": str,
    "boolean": bool,
    "array": list[str],
}
"""Types of options by the types of JSON schemas."""


class _ServeCommand(TyperCommand):
    """A command whose options are made when they are first needed.

    Making them loads the server's settings, and with them pydantic and torch. `tokendial --help`
    must not wait for that.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line with the generated options."""
        _check_packages()
        self.callback = self._command.callback
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the generated options."""
        options: list[Any] = self._command.get_params(ctx)
        return options

    @cached_property
    def _command(self) -> Any:
        commands = typer.Typer(add_completion=False)
        commands.command()(_with_settings_options(_serve_command))
        return typer.main.get_command(commands)


@app.command(cls=_ServeCommand, rich_help_panel=USE_PANEL)
def serve() -> None:
    """Serve runs over HTTP. Under load, the degree rises to meet a latency objective."""


def _serve_command(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, each as FOLDER or NAME=FOLDER. All must share one backbone.",
        ),
    ],
    optimize: Optimize = False,
    compile: Compile = False,
    runtime: RuntimeOption = None,
    precision: PrecisionOption = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key per line. TOKENDIAL_API_KEYS holds more keys, separated by "
            "commas. Without keys, anyone who reaches the server may use it."
        ),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Serve on a Ray cluster: that of RAY_ADDRESS, else a new one here."
        ),
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=1, help="With --ray: number of copies of the model.")
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: add copies under load, up to this number."),
    ] = None,
    home: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --ray: degree the autoscaler sizes for; it adds copies until this degree "
            "suffices.",
        ),
    ] = 0,
    **options: Any,
) -> None:
    from tokendial.runtimes import PLAIN
    from tokendial.serve.http.server import bind_socket
    from tokendial.serve.settings import check_settings, read_api_keys, readable_by_others

    folders = _folders_by_name(runs)
    # Settings that were not given keep their defaults; some of these depend on the machine.
    given = {name: value for name, value in options.items() if _is_given(context, name)}
    asked = runtime_of(runtime, precision, optimize, compile)
    first, *others = folders.values()
    chosen = asked or PLAIN if others else runtime_for(first, asked)
    settings = check_settings(given | {"runtime": chosen, "api_keys": read_api_keys(api_keys)})
    if api_keys is not None and readable_by_others(api_keys):
        print(f"api_keys: every user of this machine can read {api_keys}.", file=sys.stderr)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    # These two also log mistakes of clients, which the error responses already explain.
    for name in ("uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray:
        _serve_on_ray(folders, settings, replicas, max_replicas, home)
        return
    if (replicas, max_replicas, home) != (1, None, 0):
        raise ValueError("replicas, max_replicas and home need --ray.")
    with bind_socket(settings) as listener:  # a taken address is found before models are loaded
        _serve(folders, settings, listener)


def _with_settings_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a function the signature that Typer reads: its own parameters and all settings."""

    def command(**arguments: Any) -> None:
        function(**arguments)

    own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters[2:2] = settings_options()  # after the context and the runs
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = serve.__doc__
    return command


def settings_options() -> list[inspect.Parameter]:
    """Make an option of each field of `Settings`: name, type, default, help and range."""
    from tokendial.serve.settings import Settings

    schemas = Settings.model_json_schema()["properties"]
    return [
        _option(name, schemas[name], field.default)
        for name, field in Settings.model_fields.items()
        if name not in _OTHER_OPTIONS
    ]


def _option(name: str, schema: Mapping[str, Any], default: object) -> inspect.Parameter:
    # An optional setting is a union of its type and null.
    typed = schema["anyOf"][0] if "anyOf" in schema else schema
    option = typer.Option(help=f"{schema['description']}{_range_text(typed)}")
    kind = _TYPES[typed["type"]]
    default = list(default) if isinstance(default, tuple) else default
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if default is None else kind, option],
    )


def _range_text(schema: Mapping[str, Any]) -> str:
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
    }
    parts = [f"{words} {schema[key]:g}" for key, words in limits.items() if key in schema]
    return f" Must be {' and '.join(parts)}." if parts else ""


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _check_packages() -> None:
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"serving needs {', '.join(missing)}, which is not installed: "
            "pip install 'tokendial[serve]'."
        )


def _serve(folders: dict[str, Path], settings: "Settings", listener: socket.socket) -> None:
    from tokendial.serve.http.app import create_app
    from tokendial.serve.http.server import (
        UNPROTECTED_WARNING,
        Server,
        is_unprotected,
        server_url,
    )
    from tokendial.serve.starting import start_engine
    from tokendial.serve.workers.decoder_pool import DecoderPool

    # Decoders load their libraries while the models are loaded.
    with closing(DecoderPool(settings)) as decoders:
        served, engine, settings = start_engine(folders, settings)
        with closing(served):
            catalog = served.supervisor.catalog
            offered = catalog.allowed_degrees(settings.max_degree, settings.min_accuracy)
            _print_degrees(catalog, engine, offered)
            print(f"answers within {settings.slo_ms:g} ms")
            if is_unprotected(listener, settings):
                print(UNPROTECTED_WARNING.format(settings.host), file=sys.stderr)

            def ready() -> None:
                names = ", ".join(catalog.names)
                print(f"serving {names} on {server_url(listener)}", flush=True)

            def reload() -> None:
                changed = served.reload(engine.call_between_batches)
                print(f"reloaded: {', '.join(changed) or 'nothing has changed'}", flush=True)

            application = create_app(engine, served.supervisor, settings, decoders)
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
    from tokendial.serve.ray.deployment import RayDeployment

    # Replicas have other working directories than this command.
    runs = {name: folder.resolve() for name, folder in folders.items()}
    if settings.compensator:
        compensator = str(Path(settings.compensator).resolve())
        settings = settings.model_copy(update={"compensator": compensator})
    deployment = RayDeployment(
        runs=runs, settings=settings, replicas=replicas, max_replicas=max_replicas, home=home
    )

    def ready() -> None:
        names = ", ".join(runs)
        print(f"serving {names} on Ray at http://{settings.host}:{settings.port}", flush=True)

    serve_on_ray(deployment, ready)


def _print_degrees(catalog: "ModelCatalog", engine: "Engine", degrees: Sequence[int]) -> None:
    """Print cost, time and accuracy of each degree."""
    for name in catalog.names:
        title = name if len(catalog.names) > 1 else None
        table = Table("degree", "GMACs", "ms per image", "accuracy", title=title)
        for degree in degrees:
            accuracy = catalog.accuracy(name, degree)
            table.add_row(
                str(degree),
                f"{catalog.models[name].gmacs[degree]:.4f}",
                f"{1000 * engine.seconds(name, degree):.2f}",
                "" if accuracy is None else f"{accuracy:.2%}",
            )
        Console().print(table)


def _folders_by_name(texts: list[str]) -> dict[str, Path]:
    """Parse NAME=FOLDER, or FOLDER, whose name is that of the folder."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():  # the name of a folder may contain "="
            name, folder = Path(text).resolve().name, text
        if not 0 < len(name) <= _MAX_NAME_LENGTH:
            raise ValueError(f"runs: a name has 1 to {_MAX_NAME_LENGTH} letters, got {text!r}.")
        if name in folders:
            raise ValueError(f"runs: {name} is given twice; use NAME=FOLDER.")
        folders[name] = Path(folder)
    return folders
