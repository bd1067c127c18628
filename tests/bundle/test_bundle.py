import hashlib
import json
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_files import LABELS, PREPROCESS, classifier, save, small_contents, small_files, write_small_bundle

from export.bundle import write as writing
from export.bundle.read import preprocess_of, read_bundle
from export.bundle.write import write_bundle
from export.errors import BundleError
from export.images.preprocess import Preprocess
from export.onnx_file.model_file import inspect


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_small_bundle(folder / "bundle", small_files(folder))
    return folder / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def seal(folder: Path) -> None:
    """Write SHA256SUMS and the models' entries anew, as one who tampers with care would."""
    document = json.loads((folder / "bundle.json").read_text())
    for entry in document["files"].values():
        path = folder / entry["file"]
        if path.is_file():
            entry |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    (folder / "bundle.json").write_text(json.dumps(document))
    seal_sums(folder)


def seal_sums(folder: Path) -> None:
    found = {name: digest for name, digest in sorted(digests(folder).items()) if name != "SHA256SUMS"}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in found.items()))


def change_manifest(folder: Path, change: Callable[[dict[str, dict[str, dict[str, object]]]], object]) -> None:
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    (folder / "bundle.json").write_text(json.dumps(document))
    seal_sums(folder)


def test_a_written_bundle_reads_back(made: Path) -> None:
    found = read_bundle(made)
    assert (found.name, found.target, found.labels) == ("small", "cpu_avx2", LABELS)
    assert found.preprocess == Preprocess((16, 16), (18, 18), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), upright=False)
    assert found.files == {name: made / f"{name}.onnx" for name in ("teacher_fp32", "student_fp32", "student_fp16")}


def test_the_manifest_says_what_the_files_are(made: Path) -> None:
    document = json.loads((made / "bundle.json").read_text())
    assert document["input"] == {"name": "input", "shape": [None, 3, 16, 16], "dtype": "float32"}
    assert document["output"] == {"name": "logits", "shape": [None, 3], "dtype": "float32"}
    data = (made / "student_fp32.onnx").read_bytes()
    assert document["files"]["student_fp32"] == {
        "file": "student_fp32.onnx",
        "precision": "fp32",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "opset": 18,
        "ir_version": 9,
        "score": 0.75,
        "agreement": 1.0,
    }


def test_sha256sum_accepts_the_bundle(made: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    lines = subprocess.run(command, cwd=made, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()]
    assert sorted(lines) == sorted(f"{file}: OK" for file in files if file != "SHA256SUMS")


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_small_bundle(tmp_path / name / "bundle", small_files(tmp_path / name))
    assert digests(tmp_path / "one" / "bundle") == digests(tmp_path / "two" / "bundle")


def test_a_new_bundle_replaces_the_old_one_whole(bundle: Path, tmp_path: Path) -> None:
    write_small_bundle(bundle, {"student_fp32": save(classifier(4), tmp_path / "s.onnx")})
    models = {name for name in digests(bundle) if name.endswith(".onnx")}
    assert models == {
        "student_fp32.onnx",
        *(f"serving/{kind}/small/1/model.onnx" for kind in ("triton", "triton-python")),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "s.onnx"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        write_small_bundle(tmp_path / "home", small_files(tmp_path))
    assert (tmp_path / "home" / "thesis.txt").exists()


@pytest.mark.parametrize("step", ["fill", "read_bundle", "put_folder"])
def test_a_failure_while_writing_leaves_the_old_bundle(
    bundle: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(bundle)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, step, full)
    with pytest.raises(BundleError, match="No space left on device"):
        write_small_bundle(bundle, small_files(bundle.parent))
    assert digests(bundle) == before
    assert not list(bundle.parent.glob(".bundle-*"))


def test_a_failed_rename_brings_the_old_bundle_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(bundle)
    rename = Path.rename

    def fails_for_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(BundleError, match="Input/output error"):
        write_small_bundle(bundle, small_files(bundle.parent))
    assert digests(bundle) == before


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", ""), ("a", "b", "c\nd"), ("a", "b", " c")])
def test_labels_that_no_reader_would_understand_are_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(BundleError, match="labels"):
        write_bundle(tmp_path / "out", replace(small_contents(small_files(tmp_path)), labels=labels))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../escape", "Upper", ".hidden", "a/b", ""])
def test_model_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="must be lower-case letters"):
        write_small_bundle(tmp_path / "out", {name: save(classifier(), tmp_path / "a.onnx")})


def test_files_with_different_inputs_are_refused(tmp_path: Path) -> None:
    files = {"a": save(classifier(size=16), tmp_path / "a.onnx"), "b": save(classifier(size=24), tmp_path / "b.onnx")}
    with pytest.raises(BundleError, match="same input and output"):
        write_small_bundle(tmp_path / "out", files)


@pytest.mark.parametrize("name", ["student_fp32.onnx", "labels.txt", "preprocess.json", "bundle.json"])
def test_a_flipped_bit_is_found_and_the_file_named(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["student_fp32.onnx", "labels.txt", "preprocess.json", "bundle.json", "SHA256SUMS"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: is missing"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["student_fp32.onnx", "labels.txt", "SHA256SUMS"])
def test_a_link_is_refused_even_to_the_same_bytes(bundle: Path, name: str) -> None:
    (bundle / name).rename(bundle.parent / "elsewhere")
    (bundle / name).symlink_to(bundle.parent / "elsewhere")
    with pytest.raises(BundleError, match=f"{name}: must be a regular file"):
        read_bundle(bundle)


def test_a_linked_folder_on_the_way_is_refused(bundle: Path) -> None:
    (bundle.parent / "outside").mkdir()
    (bundle / "student_fp32.onnx").rename(bundle.parent / "outside" / "m.onnx")
    (bundle / "sub").symlink_to(bundle.parent / "outside")
    sums = (bundle / "SHA256SUMS").read_text().replace("student_fp32.onnx", "sub/m.onnx")
    (bundle / "SHA256SUMS").write_text(sums)
    with pytest.raises(BundleError, match=r"sub/m\.onnx: must be a regular file"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "a\x00b", ""])
def test_a_model_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes((bundle / "student_fp32.onnx").read_bytes())
    change_manifest(bundle, lambda document: document["files"]["student_fp32"].update(file=name))
    with pytest.raises(BundleError, match="must be a file inside the bundle"):
        read_bundle(bundle)


def test_a_digest_list_that_leaves_the_bundle_is_refused(bundle: Path) -> None:
    sums = (bundle / "SHA256SUMS").read_text()
    (bundle / "SHA256SUMS").write_text(f"{sums}{'0' * 64}  ../secret\n")
    with pytest.raises(BundleError, match="must be a file inside the bundle"):
        read_bundle(bundle)


def test_a_model_that_no_digest_covers_is_refused(bundle: Path) -> None:
    lines = (bundle / "SHA256SUMS").read_text().splitlines(keepends=True)
    (bundle / "SHA256SUMS").write_text("".join(line for line in lines if "student_fp32" not in line))
    with pytest.raises(BundleError, match=r"lists no student_fp32\.onnx"):
        read_bundle(bundle)


def test_a_model_swapped_for_another_is_found_by_its_entry(bundle: Path) -> None:
    shutil.copyfile(bundle / "teacher_fp32.onnx", bundle / "student_fp32.onnx")
    seal_sums(bundle)
    with pytest.raises(BundleError, match=r"files\.student_fp32\.sha256"):
        read_bundle(bundle)


def test_a_precision_that_the_file_does_not_have_is_refused(bundle: Path) -> None:
    change_manifest(bundle, lambda document: document["files"]["student_fp32"].update(precision="int8"))
    with pytest.raises(BundleError, match=r"files\.student_fp32\.precision: student_fp32\.onnx has 'fp32', got 'int8'"):
        read_bundle(bundle)


def test_a_label_too_few_is_refused(bundle: Path) -> None:
    (bundle / "labels.txt").write_text("cat\ndog\n")
    seal_sums(bundle)
    with pytest.raises(BundleError, match=r"labels\.txt: .* got 2 labels"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 32), ("image_size", "16"), ("resize_to", 8), ("mean", [0.5, 0.5]), ("mean", [0.5, 0.5, float("nan")]),
        ("std", [0.2, 0.2, 0]), ("std", [0.2, 0.2, float("inf")]), ("std", None),
    ],
)  # fmt: skip
def test_a_preprocessing_that_cannot_be_is_refused(bundle: Path, key: str, value: object) -> None:
    (bundle / "preprocess.json").write_text(json.dumps(PREPROCESS | {key: value}))
    seal_sums(bundle)
    with pytest.raises(BundleError, match=rf"preprocess\.json: ({key}|resize_to|must be JSON)"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"a": 1' * 9, "[" * 100_000, '{"schema_version": 2}', "\xff", "9" * 5_000]
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_bytes(text.encode("latin-1"))
    seal_sums(bundle)
    with pytest.raises(BundleError, match=r"bundle\.json: "):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "files", [None, {}, [], {"a": 1}, {"a": {}}, {"a": {"file": 3}}, {"../a": {"file": "labels.txt"}}]
)
def test_a_manifest_with_senseless_files_is_refused(bundle: Path, files: object) -> None:
    change_manifest(bundle, lambda document: document.update(files=files))  # type: ignore[call-overload]
    with pytest.raises(BundleError, match=r"bundle\.json: .*files"):
        read_bundle(bundle)


def test_a_huge_text_file_is_refused_unread(bundle: Path) -> None:
    with (bundle / "SHA256SUMS").open("r+b") as stream:
        stream.truncate(2**40)  # sparse: takes no room, and no memory could hold it
    with pytest.raises(BundleError, match="SHA256SUMS: must be at most"):
        read_bundle(bundle)


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"garbage, not protobuf", b"\x08\x09"])
def test_a_file_that_is_no_model_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / "student_fp32.onnx").write_bytes(data)
    seal(bundle)
    with pytest.raises(BundleError, match=r"student_fp32\.onnx"):
        read_bundle(bundle)


def test_external_data_is_refused_wherever_it_hides(tmp_path: Path) -> None:
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../etc/passwd")
    in_constant = helper.make_node("Constant", [], ["k"], value=outside)
    branch = helper.make_graph([in_constant], "branch", [], [])
    hidden: dict[str, Callable[[ModelProto], object]] = {
        "initializer": lambda model: model.graph.initializer.append(outside),
        "attribute": lambda model: model.graph.node.append(in_constant),
        "subgraph": lambda model: model.graph.node.append(helper.make_node("If", ["q"], ["k"], then_branch=branch)),
        "function": lambda model: model.functions.append(
            helper.make_function("d", "f", [], ["k"], [in_constant], [helper.make_opsetid("", 18)])
        ),
    }
    refused = []
    for place, hide in hidden.items():
        model = classifier()
        hide(model)
        path = tmp_path / f"{place}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(BundleError, match="in another file"):
            inspect(path)
        refused.append(place)
    assert refused == list(hidden)


def test_the_line_that_refuses_external_data_writes_one_file(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "it's.onnx", save_as_external_data=True, location="data", size_threshold=0)
    with pytest.raises(BundleError, match="in its folder: python -c") as refused:
        inspect(tmp_path / "it's.onnx")
    line = str(refused.value).partition("in its folder: ")[2]
    subprocess.run(shlex.split(line.replace("python", sys.executable, 1)), cwd=tmp_path, check=True)
    (tmp_path / "data").unlink()
    inspect(tmp_path / "one_it's.onnx")


def test_golden_outputs_are_what_another_session_answers(made: Path) -> None:
    """With ONNX Runtime's own defaults, all images in one batch."""
    found = read_bundle(made)
    pixels = np.load(made / "golden" / "images.npy")
    np.testing.assert_array_equal(pixels, found.golden.images)
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.3], np.float32)
    np.testing.assert_allclose(found.golden.inputs.transpose(0, 2, 3, 1), (pixels / 255 - mean) / std, atol=1e-5)
    for name, path in found.files.items():
        (logits,) = onnxruntime.InferenceSession(path).run(None, {"input": np.load(made / "golden" / "inputs.npy")})
        assert found.golden.differing(name, logits) == []
        np.testing.assert_array_equal(np.load(made / "golden" / f"{name}.npy"), found.golden.outputs[name])


def test_golden_outputs_name_the_runtime_that_gave_them(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaded one, whatever a document from an earlier run says."""
    assert read_bundle(bundle).golden.made_with["onnxruntime"] == onnxruntime.__version__
    monkeypatch.setattr(onnxruntime, "__version__", "99.1")
    write_small_bundle(tmp_path / "again", small_files(tmp_path))
    assert read_bundle(tmp_path / "again").golden.made_with["onnxruntime"] == "99.1"


def test_a_bundle_that_does_not_name_the_runtime_of_its_golden_outputs_is_read(bundle: Path) -> None:
    change_manifest(bundle, lambda document: document["golden"].pop("made_with"))
    assert read_bundle(bundle).golden.made_with == {}


def test_a_golden_answer_beyond_its_tolerance_is_told_by_image(made: Path) -> None:
    golden = read_bundle(made).golden
    logits = golden.outputs["student_fp32"].copy()
    logits[1, 0] += 0.9 * golden.tolerance["student_fp32"][""]
    logits[2, 1] -= 1.1 * golden.tolerance["student_fp32"][""]
    logits[3, 2] = np.nan
    assert golden.differing("student_fp32", logits) == [2, 3]
    assert golden.tolerance["student_fp32"][""] == pytest.approx(1e-3 * golden.outputs["student_fp32"].std(), rel=0.01)


@pytest.mark.parametrize(("key", "value"), [("mean", [0.5, 0.3, 0.4]), ("std", [0.2, 0.25, 0.3001])])
def test_a_normalization_that_the_golden_inputs_contradict_is_refused(bundle: Path, key: str, value: object) -> None:
    (bundle / "preprocess.json").write_text(json.dumps(PREPROCESS | {key: value}))
    seal_sums(bundle)
    with pytest.raises(BundleError, match=r"preprocess\.json: mean and std"):
        read_bundle(bundle)


def npy(header: str, data: bytes = b"") -> bytes:
    """Return a .npy file of version 1.0 with any header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"", b"garbage", b"\x93NUMPY\x02\x00" + b"\x00" * 40, b"\x93NUMPY\x01\x00\xff\xff{",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}", b"\0" * 47),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}", b"\0" * 49),
        npy("{'descr': '<f4', 'fortran_order': True, 'shape': (4, 3)}", b"\0" * 48),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (4, 3)}", b"\0" * 96),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 3)}", b"\0" * 48),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3)}", pickle.dumps(np.zeros((4, 3)))),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 600 + "}"),
        npy("__import__('os')"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_the_one_expected_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "golden" / "student_fp32.npy").write_bytes(content)
    seal_sums(bundle)
    with pytest.raises(BundleError, match=r"student_fp32\.npy: must "):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "golden",
    [
        None, {}, {"truths": []}, {"truths": [0, 1, 2, 3]}, {"truths": [0, 1, 2, True]}, {"truths": [0] * 65},
        {"tolerance": {}}, {"tolerance": {"teacher_fp32": -1.0}}, {"tolerance": "none"}, {"made_with": "1.32.0"},
    ],
)  # fmt: skip
def test_senseless_facts_of_the_golden_images_are_refused(bundle: Path, golden: dict[str, object] | None) -> None:
    def change(document: dict[str, dict[str, dict[str, object]]]) -> None:
        if not golden:
            document["golden"] = golden  # type: ignore[assignment]
        else:
            document["golden"] |= golden  # type: ignore[arg-type]

    change_manifest(bundle, change)
    with pytest.raises(BundleError, match=r"bundle\.json: golden"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("key", "value"), [("served", "student_int8"), ("served", None), ("name", "../up"), ("name", 3)]
)
def test_a_bundle_that_serves_nothing_or_has_no_plain_name_is_refused(bundle: Path, key: str, value: object) -> None:
    change_manifest(bundle, lambda document: document.update({key: value}))  # type: ignore[dict-item]
    with pytest.raises(BundleError, match=rf"bundle\.json: {key}: must be"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "Upper", "", "a" * 65])
def test_a_bundles_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    contents = replace(small_contents(small_files(tmp_path)), name=name)
    with pytest.raises(BundleError, match="name: must be lower-case letters"):
        write_bundle(tmp_path / "out", contents)


@pytest.mark.parametrize("name", ["../up", "/tmp/abs", "a/../../up", "labels.txt", "golden"])
def test_a_document_that_leaves_the_bundle_or_replaces_a_file_is_refused(tmp_path: Path, name: str) -> None:
    contents = replace(small_contents(small_files(tmp_path)), documents={name: b"x"})
    with pytest.raises(BundleError, match="must be a new file inside the bundle"):
        write_bundle(tmp_path / "out", contents)
    assert not (tmp_path / "out").exists()


def test_a_file_that_answers_no_numbers_is_not_bundled(tmp_path: Path) -> None:
    model = classifier()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), np.nan, np.float32), tensor.name))
    with pytest.raises(BundleError, match="student_fp32: its outputs for a golden image are not finite"):
        write_small_bundle(tmp_path / "out", {"student_fp32": save(model, tmp_path / "nan.onnx")})


# What an older bundle does not say


def test_a_bundle_that_says_nothing_of_orientation_takes_photographs_as_they_are_stored(bundle: Path) -> None:
    assert not read_bundle(bundle).preprocess.upright


def test_training_and_bundle_say_the_same_of_orientation() -> None:
    assert preprocess_of(json.loads(json.dumps(Preprocess((8, 8), (8, 8), (0.5,) * 3, (0.2,) * 3).to_json()))).upright


def test_an_unknown_orientation_is_refused() -> None:
    with pytest.raises(BundleError, match=r"preprocess\.json: orientation: must be 'EXIF' or 'as stored', got 'up'"):
        preprocess_of(PREPROCESS | {"orientation": "up"})


# The images that it was judged by


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    contents = replace(small_contents(small_files(tmp_path)), validation=["0123456789abcdef", "f" * 16])
    write_bundle(tmp_path / "judged", contents)
    return tmp_path / "judged"


def test_a_bundle_knows_the_images_that_it_was_judged_by(judged: Path, bundle: Path) -> None:
    assert read_bundle(judged).validation == ("0123456789abcdef", "f" * 16)
    assert read_bundle(bundle).validation == ()  # an older one


def test_a_line_that_is_no_digest_is_refused(judged: Path) -> None:
    (judged / "validation.txt").write_text("0123456789ABCDEF\n")
    seal_sums(judged)
    with pytest.raises(
        BundleError, match=r"validation\.txt: must be 16 hexadecimal digits per line, got '0123456789ABCDEF'"
    ):
        read_bundle(judged)


def test_a_list_of_images_that_no_digest_covers_or_that_is_missing_is_refused(judged: Path, bundle: Path) -> None:
    (bundle / "validation.txt").write_text("0123456789abcdef\n")
    with pytest.raises(BundleError, match=r"SHA256SUMS: lists no validation\.txt"):
        read_bundle(bundle)
    (judged / "validation.txt").unlink()
    with pytest.raises(BundleError, match=r"validation\.txt: is missing"):
        read_bundle(judged)
