"""The rules of the code base that no single file can show: who may import whom and what."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "router", "replicas", "kernels", "proto")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 350

# package -> what it may import of trimode; a dot at the end stands for everything below.
DIRECTIONS = {
    "cluster": ("cluster.", "router.", "replicas.", "proto."),
    "router": ("router.", "replicas.types", "replicas.page_hash", "replicas.errors"),
    "replicas": ("replicas.", "kernels."),
    "kernels": ("kernels.",),
    "proto": ("proto.",),
}

# library -> the only files (or, with a slash at the end, folders) that may import it.
ALLOWED_IN = {
    "redis": ("router/redis_store.py",),
    "grpc": ("cluster/gateway.py", "cluster/client.py", "cluster/grpc_server.py", "proto/"),
    "grpc_health": ("cluster/grpc_server.py",),
    "grpc_reflection": ("cluster/grpc_server.py",),
    "jinja2": ("cluster/chat_template.py", "cluster/template_sandbox.py"),
    "opentelemetry.sdk": ("cluster/telemetry.py",),
    "huggingface_hub": ("replicas/model/hub.py", "replicas/model/file_check.py"),
    "ray": (
        "cluster/",
        "router/request_router.py",
        "replicas/replica.py",
        "replicas/ranks.py",
        "replicas/rank_actor.py",
    ),
    "transformers": ("cluster/bench/transformers_baseline.py",),
}

# What gateways and routers load, and what is tested without it: no torch, not even by detour.
TORCH_FREE = (
    "cluster/gateway.py",
    "cluster/tokenizer.py",
    "cluster/client.py",
    "cluster/bench/command.py",
    "router/",
    "replicas/types.py",
    "replicas/errors.py",
    "replicas/config.py",
    "replicas/page_hash.py",
    "replicas/page_pool.py",
    "replicas/prefix_cache.py",
    "replicas/grammar.py",
    "replicas/stop_strings.py",
    "replicas/round_sizes.py",
    "replicas/page_tables.py",
    "replicas/queries.py",
    "replicas/scheduled.py",
    "replicas/sequence.py",
    "replicas/scheduler.py",
    "replicas/acceptance.py",
    "replicas/governor.py",
    "replicas/step_profile.py",
    "replicas/decoding/",
)

# Imports inside functions: (file, module), and why.
LAZY_IMPORTS: set[tuple[str, str]] = {
    # Each command loads only what it needs.
    ("cluster/__main__.py", "trimode.cluster.calibrate"),
    ("cluster/chat_command.py", "trimode.cluster.chat"),
    ("cluster/__main__.py", "trimode.cluster.check"),
    ("cluster/generate_command.py", "trimode.cluster.generate"),
    ("cluster/__main__.py", "trimode.cluster.serve"),
    ("cluster/bench/command.py", "trimode.cluster.bench.session"),
    # Its import changes how input() reads from a terminal.
    ("cluster/chat.py", "readline"),
    # It imports transformers, which only --against needs.
    ("cluster/bench/session.py", "trimode.cluster.bench.transformers_baseline"),
    # After its backend was chosen.
    ("cluster/bench/plot.py", "matplotlib"),
    # Only `plot` needs it.
    ("cluster/calibrate.py", "matplotlib"),
    ("replicas/checkpoint/report.py", "matplotlib"),
    # Processes that only name the deployment do not pay for torch.
    ("replicas/replica.py", "torch"),
    ("replicas/replica.py", "trimode.replicas.loading"),
    ("replicas/replica.py", "trimode.replicas.model.hub"),
    ("replicas/replica.py", "trimode.replicas.rank_actor"),
    ("replicas/replica.py", "trimode.replicas.ranks"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_generated(path: Path) -> bool:
    return path.stem.endswith(("_pb2", "_pb2_grpc"))


def modules_of(node: ast.AST) -> list[str]:
    """Every module that an import statement may load; none for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, "relative import"
        # `from package import module` loads the module, too.
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name for name in inner if file_of(name)] or [node.module]
    return []


def file_of(module: str) -> Path | None:
    """The file of a module of trimode."""
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if module.startswith("trimode.") and path.is_file() else None


def imports(path: Path) -> Iterator[str]:
    """All modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from modules_of(node)


def top_imports(path: Path) -> list[str]:
    """The modules that loading a file loads."""
    return [module for node in ast.parse(path.read_text()).body for module in modules_of(node)]


def matches(name: str, rules: tuple[str, ...], separator: str) -> bool:
    return any(
        name.startswith(rule) if rule.endswith(separator) else name == rule for rule in rules
    )


def is_under(module: str, library: str) -> bool:
    return module == library or module.startswith(f"{library}.")


def torch_free_files() -> list[Path]:
    return [path for path in FILES if matches(name_of(path), TORCH_FREE, "/")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    allowed = DIRECTIONS[path.relative_to(ROOT).parts[0]]
    own = [
        module.removeprefix("trimode.") for module in imports(path) if is_under(module, "trimode")
    ]
    assert [module for module in own if not matches(module, allowed, ".")] == []


@pytest.mark.parametrize("library", ALLOWED_IN)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = [
        name_of(path)
        for path in FILES
        if any(is_under(module, library) for module in imports(path))
    ]
    assert [name for name in users if not matches(name, ALLOWED_IN[library], "/")] == []


@pytest.mark.parametrize("path", torch_free_files(), ids=name_of)
def test_what_runs_without_torch_does_not_load_it(path: Path) -> None:
    seen, ahead = set(), [(path, name_of(path))]
    while ahead:
        current, route = ahead.pop()
        for module in top_imports(current):
            assert not is_under(module, "torch"), f"{route} imports {module}"
            target = file_of(module)
            if target is not None and target not in seen:
                seen.add(target)
                ahead.append((target, f"{route} -> {name_of(target)}"))


def test_imports_stand_at_the_top_of_their_file() -> None:
    lazy = set()
    for path in (path for path in FILES if not is_generated(path)):
        tree = ast.parse(path.read_text())
        for node in set(ast.walk(tree)) - set(tree.body):
            lazy |= {(name_of(path), module) for module in modules_of(node)}
    assert lazy - LAZY_IMPORTS == set()


def test_every_folder_of_modules_is_packaged() -> None:
    """Else it works in a checkout and is missing from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(("trimode", *path.parent.relative_to(ROOT).parts)) for path in FILES}
    assert found <= set(settings["packages"])


def test_no_package_has_an_init_file() -> None:
    """One would shadow the libraries that are called kernels and proto."""
    assert [name_of(path) for path in FILES if path.name == "__init__.py"] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_short(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES or is_generated(path)
