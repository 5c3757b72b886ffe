"""The run folders that are served: loading them, and loading them again when they change."""

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.runs.training_images import calibration_images
from tokendial.serve.scheduling.engine import WorkerLostError
from tokendial.serve.settings import Settings
from tokendial.serve.workers.catalog import ModelCatalog
from tokendial.serve.workers.messages import LoadModels
from tokendial.serve.workers.model_process import ForkServer
from tokendial.serve.workers.models import LoadedModels, load_models
from tokendial.serve.workers.open_files import FilePaths, OpenFolder, link_files
from tokendial.serve.workers.supervisor import Supervisor


class ServedRuns:
    """Run folders, and the supervisor of the processes that run their models. Thread-safe."""

    supervisor: Supervisor
    """Runs the models."""

    def __init__(self, runs: Mapping[str, Run], settings: Settings) -> None:
        """Load the runs.

        Args:
            runs: The runs by the names that they are served under.
            settings: Compensator, optimisation, threads and the largest batch.

        Raises:
            ValueError: If the runs cannot be loaded; see `load_models`.
        """
        self._runs, self._settings = runs, settings
        self._reload_lock = threading.Lock()
        self._source = self._open_source()
        try:
            self.supervisor = Supervisor(
                partial(ForkServer, self._source.first),
                partial(ForkServer, self._source.again),
            )
        except WorkerLostError as error:
            self._source.close()
            raise ValueError(f"the models cannot be loaded: {error}") from None
        except BaseException:
            self._source.close()
            raise

    def keep_spare(self) -> None:
        """Keep a spare model process from now on, if one is wanted."""
        # A model process takes long to become ready where it has something to prepare.
        slow = bool(self._settings.runtime) or default_device() != "cpu"
        if self._settings.spare and slow:
            self.supervisor.keep_spare()

    def reload(
        self, call_between_batches: Callable[[Callable[[], None]], Future[None]]
    ) -> list[str]:
        """Load runs that have changed on disk, while the old models go on answering.

        During this time the models are in memory twice. Concurrent calls run one after the other.

        Args:
            call_between_batches: `Engine.call_between_batches`.

        Returns:
            Names of the runs that have changed.

        Raises:
            ValueError: If a run cannot be loaded any more, or its classes, image size or degrees
                have changed. The old models stay.
        """
        with self._reload_lock:
            models = self.supervisor.catalog.models
            changed = [n for n, run in self._runs.items() if run.revision() != models[n].revision]
            if changed:
                self._replace_models(call_between_batches)
            return changed

    def close(self) -> None:
        """End the processes and close the files."""
        self.supervisor.close()
        self._source.close()

    def _replace_models(
        self, call_between_batches: Callable[[Callable[[], None]], Future[None]]
    ) -> None:
        source = self._open_source()
        try:
            fork_server, process = self.supervisor.start_processes(
                partial(ForkServer, source.first)
            )
        except BaseException:
            source.close()
            raise
        try:
            for name in self._runs:
                if _interface(fork_server.catalog, name) != _interface(
                    self.supervisor.catalog, name
                ):
                    raise ValueError(
                        f"{name} has other classes, degrees, image size or stages of a cascade "
                        "now: restart the server."
                    )
            replace = partial(
                self.supervisor.replace_processes,
                partial(ForkServer, source.again),
                fork_server,
                process,
            )
            call_between_batches(replace).result()
        except BaseException:
            process.kill()
            fork_server.close()
            source.close()
            raise
        self._source, old = source, self._source
        old.close()

    def _open_source(self) -> "_ModelSource":
        settings = self._settings
        folders = [run.folder for run in self._runs.values()]
        compensator = Path(settings.compensator) if settings.compensator else None
        if compensator:
            folders.append(compensator)
        files = [OpenFolder(folder) for folder in folders]
        paths = [folder.paths for folder in files]
        cascade = settings.cascade
        first = partial(load_models, self._runs, compensator=compensator, cascade=cascade)
        again = partial(_load_open_files, tuple(self._runs), folders, paths, cascade=cascade)
        run = next(iter(self._runs.values()))
        images = partial(calibration_images, run)
        rest = settings.runtime, run.runtime_folder, images, settings.max_batch, settings.threads
        return _ModelSource(LoadModels(first, *rest), LoadModels(again, *rest), files)


@dataclass(frozen=True, slots=True)
class _ModelSource:
    """Files that the models are loaded from."""

    first: LoadModels
    """Loads what is in the folders now."""
    again: LoadModels
    """Loads the same later, from the open files."""
    files: Sequence[OpenFolder]
    """The open files."""

    def close(self) -> None:
        for folder in self.files:
            folder.close()


def _load_open_files(
    names: Sequence[str], folders: Sequence[Path], paths: Sequence[FilePaths], *, cascade: bool
) -> LoadedModels:
    """Load runs, and the compensator if there is one more folder, from open files."""
    with tempfile.TemporaryDirectory() as temporary:
        linked = [
            link_files(files, folder, Path(temporary) / str(number))
            for number, (folder, files) in enumerate(zip(folders, paths, strict=True))
        ]
        runs = {name: Run(folder) for name, folder in zip(names, linked, strict=False)}
        compensator = linked[len(names)] if linked[len(names) :] else None
        return load_models(runs, compensator=compensator, cascade=cascade)


def _interface(catalog: ModelCatalog, name: str) -> tuple[Any, ...]:
    """What clients and waiting requests rely on; a reload must not change it."""
    model = catalog.models[name]
    cascade = model.cascade.degrees if model.cascade else None
    return catalog.kind(name), model.classes, catalog.input_shape, catalog.degrees, cascade
