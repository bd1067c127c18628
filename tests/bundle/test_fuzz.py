"""Random damage to every file of a bundle: what comes out is a BundleError or nothing, and nothing outside the bundle is opened.

`make fuzz` does the same for as long as one likes, led by coverage.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.harness import MODEL, TARGETS, OutsideError, Template, watched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.bundle.sandbox import vet
from export.errors import BundleError

EXAMPLES = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
INTERESTING = (
    b"\xff",
    b"\x00",
    b"\xff" * 9 + b"\x01",
    b"\x80" * 9,
    b"../",
    b"\n",
    b'"',
    b"9" * 5000,
    b"[" * 2000,
    b"NaN",
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["..", "/etc/passwd", "a\x00b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template(tmp_path_factory.mktemp("fuzz"))


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a function that replaces, inserts or removes a few bytes in a few places."""
    places = draw(
        st.lists(
            st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(INTERESTING) | st.binary(max_size=8)),
            min_size=1,
            max_size=4,
        )
    )

    def edit(data: bytes) -> bytes:
        for place, removed, inserted in places:
            start = int(place * len(data))
            data = data[:start] + inserted + data[start + removed :]
        return data

    return edit


@pytest.mark.parametrize("file", TARGETS)
@pytest.mark.parametrize("seal", [True, False])
@EXAMPLES
@given(edit=edits())
def test_damaged_bytes_are_a_sentence(
    template: Template, file: str, seal: bool, edit: Callable[[bytes], bytes]
) -> None:
    data = edit(template.files[file])
    amiss = template.read({file: data}, seal=seal)
    assert amiss or seal or data == template.files[file]


@pytest.mark.parametrize("file", TARGETS)
@EXAMPLES
@given(data=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_sentence(template: Template, file: str, data: bytes) -> None:
    assert template.read({file: data}) or file == "labels.txt"


def replaced(document: object, path: list[float], value: object) -> object:
    """Return the JSON document with the value at a random path replaced."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = keys[int(path[0] * (len(keys) - 1))]
    copy = dict(document) if isinstance(document, dict) else dict(enumerate(document))
    copy[key] = replaced(copy[key], path[1:], value)
    return copy if isinstance(document, dict) else list(copy.values())


@pytest.mark.parametrize("file", ["bundle.json", "preprocess.json"])
@EXAMPLES
@given(path=st.lists(st.floats(0, 1), max_size=4), value=VALUES)
def test_any_json_is_a_sentence_or_legal(template: Template, file: str, path: list[float], value: object) -> None:
    document = replaced(json.loads(template.files[file]), path, value)
    amiss = template.read({file: json.dumps(document).encode("utf-8", "surrogatepass")})
    assert amiss or isinstance(document, dict)


@EXAMPLES
@given(
    names=st.lists(
        st.text(max_size=30) | st.sampled_from(["/etc/passwd", "../secret", "golden", "golden/../../x"]), max_size=4
    )
)
def test_any_names_in_the_digests_are_a_sentence(template: Template, names: list[str]) -> None:
    lines = template.files["SHA256SUMS"] + "".join(f"{'0' * 64}  {name}\n" for name in names).encode()
    assert bool(template.read({"SHA256SUMS": lines})) == bool(names)


@settings(EXAMPLES, max_examples=40)
@given(
    file=st.sampled_from(TARGETS),
    kind=st.sampled_from(["gone", "link", "dangling link", "link to itself", "folder", "pipe"]),
    seed=st.integers(0, 5),
)
def test_any_kind_of_file_is_a_sentence(
    template: Template, tmp_path_factory: pytest.TempPathFactory, file: str, kind: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    copy = Path(shutil.copytree(template.folder, folder / "bundle"))
    (copy / file).unlink()
    match kind:
        case "link":
            (copy / file).symlink_to("/etc/passwd")
        case "dangling link":
            (copy / file).symlink_to("/nowhere/at/all")
        case "link to itself":
            (copy / file).symlink_to(copy / file)
        case "folder":
            (copy / file).mkdir()
        case "pipe":
            os.mkfifo(copy / file)
    damaged = object.__new__(Template)
    damaged.folder = copy
    assert damaged.read_as_it_is(models=[MODEL] if file != MODEL else [])


@settings(EXAMPLES, max_examples=1)
@given(changes=st.lists(edits(), min_size=40, max_size=40))
def test_damaged_models_never_reach_this_process(
    template: Template, tmp_path_factory: pytest.TempPathFactory, changes: list[Callable[[bytes], bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{number}.onnx" for number in range(len(changes))]
    for path, edit in zip(paths, changes, strict=True):
        path.write_bytes(edit(template.files[MODEL]))
    found = vet(paths)
    assert len(found) == len(paths)
    assert any(isinstance(one, BundleError) for one in found)


def test_the_watch_sees_what_is_opened_outside(template: Template, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (template.folder / "way_out").symlink_to(tmp_path / "secret")
    try:
        for path in (tmp_path / "secret", template.folder / "way_out"):
            with pytest.raises(OutsideError), watched(template.folder):
                path.read_bytes()
        with pytest.raises(OutsideError), watched(template.folder):
            (template.folder / "labels.txt").write_text("written")
        with pytest.raises(OutsideError), watched(template.folder):
            os.system("true")
        with watched(template.folder):
            (template.folder / "labels.txt").read_bytes()
    finally:
        (template.folder / "way_out").unlink()
