"""Are downloaded files what the hub has? Each is hashed once; a note of that is kept by them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import structlog
from huggingface_hub.hf_api import RepoSibling

from trimode.replicas.errors import CheckpointError

logger = structlog.get_logger(__name__)

CHUNK_BYTES = 8 * 1024 * 1024

# Told what is being done, and the bytes so far of how many.
Report = Callable[[str, int, int], None]


def check(folder: Path, files: Iterable[RepoSibling], report: Report) -> None:
    """Hash the files of a snapshot that were not found intact before; remove one that is not.

    files: what the hub says of them. Raises CheckpointError that names the file.
    """
    known = {file.rfilename: file for file in files}
    ahead = [(known[name], path) for name, path in unchecked(folder) if name in known]
    total = sum(path.stat().st_size for _, path in ahead)
    done = 0
    for file, path in ahead:
        digest, wanted = _digests(path, file)
        for chunk in _chunks(path):
            digest.update(chunk)
            done += len(chunk)
            report("checking", done, total)
        if digest.hexdigest() != wanted:
            path.resolve().unlink()
            path.unlink(missing_ok=True)  # the link to it
            raise CheckpointError(
                f"{path} was damaged: its {digest.name} is {digest.hexdigest()}, the hub says "
                f"{wanted}. It was removed; start again to download it anew"
            )
    _write_note(folder)


def unchecked(folder: Path) -> list[tuple[str, Path]]:
    """The files of a snapshot, by name, that were not found intact or have changed since."""
    try:
        states = json.loads(_note(folder).read_text())
    except (OSError, ValueError):
        states = {}
    return [(name, path) for name, path in _files(folder) if states.get(name) != _state(path)]


def _digests(path: Path, file: RepoSibling) -> tuple[Any, str]:
    """A hash to fill with the file's content, and what it must come to."""
    if file.lfs is not None:
        return hashlib.sha256(), file.lfs.sha256
    # A git blob's id.
    header = f"blob {path.stat().st_size}\0".encode()
    return hashlib.sha1(header, usedforsecurity=False), file.blob_id or ""


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _write_note(folder: Path) -> None:
    note = _note(folder)
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps({name: _state(path) for name, path in _files(folder)}))
    except OSError as error:  # a read-only cache: they are hashed again next time
        logger.warning("the check of the model's files cannot be noted", reason=str(error))


def _note(folder: Path) -> Path:
    """Beside the snapshots of huggingface_hub's cache, so that it goes when they go."""
    return folder.parent.parent / "checked" / f"{folder.name}.json"


def _files(folder: Path) -> list[tuple[str, Path]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path) for path in paths]


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
