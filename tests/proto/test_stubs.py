"""The committed stubs are what the pinned generator makes of the committed proto."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Itrimode/proto=proto", f"--python_out={out}",
         f"--pyi_out={out}", f"--grpc_python_out={out}", "trimode/proto/inference.proto"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return out / "trimode" / "proto"


@pytest.mark.parametrize("name", STUBS)
def test_committed_stub_is_up_to_date(regenerated: Path, name: str) -> None:
    assert (ROOT / "proto" / name).read_text() == (regenerated / name).read_text()
