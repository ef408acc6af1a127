"""Models of a hub: into huggingface_hub's cache, at one commit, checked file by file. Only
safetensors, JSON and templates are fetched: no code and no pickle.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.file_check import Report, check, unchecked
from trimode.replicas.model.source import HubModel, ModelSource

logger = structlog.get_logger(__name__)

TEXT_PATTERNS = ("*.json", "*.jinja")
WEIGHT_PATTERNS = ("*.safetensors",)
REQUEST_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Hub:
    """Which hub and which cache; None: as huggingface_hub's environment says."""

    endpoint: str | None = None
    cache: Path | None = None

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint)


def local_folder(
    source: ModelSource,
    *,
    weights: bool = True,
    report: Report = lambda *_: None,
    hub: Hub = Hub(),
) -> Path:
    """The model folder of a source, downloaded where it must be; without weights only what a
    gateway needs.

    What was checked once needs no hub any more. Raises CheckpointError that says what to do.
    """
    if isinstance(source, Path):
        return source
    model = _pin(source, hub)
    patterns = [*TEXT_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    cached = _cached(model, patterns, hub)
    if cached is not None and not unchecked(cached):
        return cached
    try:
        files = hub.api.model_info(
            model.name, revision=model.revision, files_metadata=True, timeout=REQUEST_TIMEOUT_S
        ).siblings
        folder = _download(model, patterns, hub, report)
    except Exception as error:  # the HTTP client's own errors come through, too
        failure = _explain(model, error)
        if cached is None or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            raise failure from None
        logger.warning("model files could not be checked against the hub", reason=str(error))
        return cached
    check(folder, files or [], report)
    return folder


def pin(source: ModelSource, hub: Hub = Hub()) -> ModelSource:
    """The source with a revision: where none is given or known, the head of this moment.

    Whoever starts several processes asks once and tells them all. Raises CheckpointError.
    """
    return source if isinstance(source, Path) else _pin(source, hub)


def _pin(model: HubModel, hub: Hub) -> HubModel:
    if model.revision is not None:
        return model
    try:
        resolved = hub.api.resolve_revision(model.name, cache_dir=hub.cache).resolved
    except Exception as error:  # the HTTP client's own errors come through, too
        raise _explain(model, error) from None
    pinned = replace(model, revision=resolved)
    logger.warning(
        "the model has no pinned revision: its head is taken", model=model.name, pin=str(pinned)
    )
    return pinned


def _cached(model: HubModel, patterns: list[str], hub: Hub) -> Path | None:
    """The folder where the cache has all of it."""
    try:
        folder = snapshot_download(
            model.name,
            revision=model.revision,
            allow_patterns=patterns,
            cache_dir=hub.cache,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _download(model: HubModel, patterns: list[str], hub: Hub, report: Report) -> Path:
    bars: list[_Bar] = []

    def tell() -> None:
        report("downloading", max(bar.n for bar in bars), max(bar.total for bar in bars))

    bar_class: Any = partial(_Bar, bars, tell)
    folder = snapshot_download(
        model.name,
        revision=model.revision,
        allow_patterns=patterns,
        cache_dir=hub.cache,
        endpoint=hub.endpoint,
        tqdm_class=bar_class,
    )
    return Path(folder)


def _explain(model: HubModel, error: Exception) -> CheckpointError:
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{model}: the hub has no such revision")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{model}: no folder here and no model of that name on the hub; if it is private or "
            "gated, set HF_TOKEN"
        )
    return CheckpointError(
        f"{model} is not in the cache and cannot be had from the hub "
        f"({type(error).__name__}: {error}). Download it on a machine that can reach one "
        f"(hf download {model.name}{f' --revision {model.revision}' if model.revision else ''} "
        "--local-dir FOLDER), copy the folder here and give its path as the model"
    )


class _Bar:
    """What huggingface_hub asks of a tqdm class; bars that count bytes tell how far they are."""

    def __init__(
        self,
        bars: "list[_Bar]",
        tell: Callable[[], None],
        *,
        total: int = 0,
        initial: int = 0,
        unit: str = "it",
        **looks: object,
    ) -> None:
        self.total, self.n = total, initial
        self.format_dict: dict[str, Any] = {}
        self._tell: Callable[[], None] | None = None
        if unit == "B":
            self._tell = tell
            bars.append(self)

    def update(self, count: float | None = 1) -> None:
        self.n += int(count or 0)
        self.refresh()

    def refresh(self) -> None:
        if self._tell is not None:
            self._tell()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, *looks: object, **more: object) -> None:
        pass

    set_description_str = set_postfix_str = close = set_description
