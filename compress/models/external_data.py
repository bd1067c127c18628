"""ONNX files whose weights lie in data files beside them: read only from inside the file's own folder, through no link."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from onnx import ModelProto, TensorProto

from compress.errors import ModelError
from export.onnx_file.model_file import MAX_BYTES, check_tensor, is_outside, read


def whole(file: Path) -> ModelProto:
    """Return the model with all weights in it; raise ModelError or BundleError where they cannot be read safely."""
    model, tensors = read(file)
    total = file.stat().st_size
    for tensor in tensors:
        if is_outside(tensor):
            data, offset, length = _place(tensor, file)
            if (total := total + length) > MAX_BYTES:
                raise ModelError(
                    f"{file}: must have at most {MAX_BYTES} bytes with its data files, as one ONNX file has: "
                    "give the network itself, not its ONNX file"
                )
            with data.open("rb") as stream:
                stream.seek(offset)
                tensor.raw_data = stream.read(length)
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        check_tensor(tensor, file.name)
    return model


def data_files(file: Path) -> list[Path]:
    """Return the files beside an ONNX file that keep its weights, in order of their names; raises as `whole` does."""
    return sorted({_place(tensor, file)[0] for tensor in read(file)[1] if is_outside(tensor)})


def _place(tensor: TensorProto, file: Path) -> tuple[Path, int, int]:
    """Return the file that keeps a tensor, the first byte of its values and their number; raise ModelError for any place but a file's bytes."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location, offset = said.get("location", ""), said.get("offset", "0")
    parts = PurePosixPath(location).parts
    if not location.isprintable() or not parts or ".." in parts or PureWindowsPath(location).anchor or "\\" in location:
        raise ModelError(
            f"{file}: keeps weights in {location!r}, and only files in its own folder are read: export it again as one file, "
            "or with its data beside it"
        )
    data = file.parent
    for part in parts:
        data /= part
        if data.is_symlink():
            raise ModelError(f"{data}: is a link, and {file.name} keeps weights in it: put the file itself there")
    if not data.is_file():
        raise ModelError(f"{data}: does not exist as a file, and {file.name} keeps weights in it: copy it there")
    size = data.stat().st_size
    length = said.get("length", "")
    if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in (offset, length or "0")):
        raise ModelError(f"{file}: takes {length!r} bytes from {offset!r} on of {location!r}: export it again")
    count = int(length) if length else max(0, size - int(offset))
    if int(offset) + count > size:
        raise ModelError(
            f"{data}: has {size} bytes, and {file.name} takes {count} from byte {offset} on: copy both files anew"
        )
    return data, int(offset), count
