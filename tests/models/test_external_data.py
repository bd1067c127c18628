"""ONNX files that keep weights in data files: read from inside their folder, and from nowhere else."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from networks import small
from onnx import ModelProto
from onnx.external_data_helper import convert_model_to_external_data
from torch import Tensor

from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.digest import files_of, source_digest
from compress.models.foreign import OnnxFile
from export.errors import UserError
from export.onnx_file.to_onnx import to_onnx

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Tensor]:
    """A network's file, and what the network answers."""
    torch.manual_seed(0)
    network, file = small(10).eval(), tmp_path_factory.mktemp("model") / "one.onnx"
    to_onnx(network, file, shape=(3, 16, 16), metadata={})
    with torch.no_grad():
        return file.read_bytes(), network(IMAGES)


def split(data: bytes, folder: Path, location: str | None = "net.data") -> Path:
    """Write a file with all weights in one data file, or with None in one for each tensor."""
    folder.mkdir(exist_ok=True)
    proto, one = onnx.load_from_string(data), location is not None
    convert_model_to_external_data(proto, all_tensors_to_one_file=one, location=location, size_threshold=0)
    onnx.save(proto, folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize("location", ["net.data", None])
def test_weights_beside_an_onnx_file_are_read(
    location: str | None, model: tuple[bytes, Tensor], tmp_path: Path
) -> None:
    file = split(model[0], tmp_path, location)
    assert len(files_of(f"onnx:{file}")) == len(list(tmp_path.iterdir())) > 1
    network = build(f"onnx:{file}", num_classes=10).eval()
    with torch.no_grad():
        assert (OnnxFile(file)(IMAGES) - model[1]).abs().max() < 1e-4
        assert (network(IMAGES) - model[1]).abs().max() < 1e-4


def test_a_key_counts_the_weights_beside_a_file(model: tuple[bytes, Tensor], tmp_path: Path) -> None:
    file = split(model[0], tmp_path)
    before, data = source_digest(f"onnx:{file}", None), tmp_path / "net.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    assert source_digest(f"onnx:{file}", None) != before


def renamed(location: str) -> Callable[[ModelProto, Path], None]:
    def change(proto: ModelProto, _: Path) -> None:
        set_(proto, "location", location)

    return change


def set_(proto: ModelProto, key: str, value: str) -> None:
    tensor = next(one for one in proto.graph.initializer if one.external_data)
    kept = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, text in kept.items():
        tensor.external_data.add(key=name, value=text)


def linked(proto: ModelProto, folder: Path) -> None:
    (folder / "link").symlink_to(folder / "net.data")
    set_(proto, "location", "link")


def in_linked_folder(proto: ModelProto, folder: Path) -> None:
    (folder / "sub").symlink_to(folder)
    set_(proto, "location", "sub/net.data")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed("../outside"), "only files in its own folder are read"),
        (renamed("sub/../../outside"), "only files in its own folder are read"),
        (renamed("/etc/hostname"), "only files in its own folder are read"),
        (renamed("C:\\outside"), "only files in its own folder are read"),
        (renamed("\0"), "only files in its own folder are read"),
        (renamed("."), "only files in its own folder are read"),
        (renamed("gone"), "gone: does not exist as a file, and net.onnx keeps weights in it: copy it there"),
        (linked, "link: is a link, and net.onnx keeps weights in it"),
        (in_linked_folder, "sub: is a link, and net.onnx keeps weights in it"),
        (lambda proto, _: set_(proto, "offset", "99999999"), r"net.data: has \d+ bytes, and net.onnx takes"),
        (lambda proto, _: set_(proto, "offset", "-1"), "bytes from '-1' on of 'net.data': export it again"),
        (lambda proto, _: set_(proto, "length", "4"), "claims the shape"),
        (lambda proto, folder: (folder / "net.data").write_bytes(b""), "net.data: has 0 bytes"),
    ],
)
def test_other_places_of_weights_are_refused(
    change: Callable[[ModelProto, Path], None], said: str, model: tuple[bytes, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(bytes(10**6))
    file = split(model[0], tmp_path / "inside")
    proto = onnx.load(file, load_external_data=False)
    change(proto, file.parent)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=said):
        OnnxFile(file)


def test_weights_of_more_than_one_file_can_hold_are_refused_unread(model: tuple[bytes, Tensor], tmp_path: Path) -> None:
    file = split(model[0], tmp_path)
    with (tmp_path / "net.data").open("r+b") as stream:
        stream.truncate(2**31)  # sparse: takes no room
    proto = onnx.load(file, load_external_data=False)
    set_(proto, "length", str(2**31))
    set_(proto, "offset", "0")
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="must have at most 2147483647 bytes with its data files"):
        OnnxFile(file)
