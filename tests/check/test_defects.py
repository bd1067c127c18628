"""Planted defects: each is found and named, also by one who makes all digests anew after planting it."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx_files import classifier, model_of, save
from planted import LABELS, SMALL, seal, tagged, write_tagged_bundle
from quantized_files import SIZE, quantized_network

from export.bundle.sandbox import ChildLimits, require_sound, seconds_for_macs, vet
from export.check.findings import check_bundle
from export.errors import BundleError

GIGABYTES_2 = 2**31


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagged_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def names(folder: Path) -> set[str]:
    """Return the names of the defects that a check finds."""
    found, findings = check_bundle(folder)
    assert (found is None) == bool(findings)
    return {finding.defect for finding in findings}


def change(folder: Path, file: str, **values: object) -> None:
    """Write some keys of a JSON file anew."""
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def put(folder: Path, model: ModelProto, name: str = "student_int8") -> None:
    """Put another model in a file's place, with the same facts of its export."""
    save(tagged(model), folder / f"{name}.onnx")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_bundle_has_no_defect(made: Path) -> None:
    found, findings = check_bundle(made)
    assert findings == []
    assert found is not None
    assert found.served == "student_int8"


@pytest.mark.parametrize(
    "file", ["student_int8.onnx", "labels.txt", "preprocess.json", "bundle.json", "golden/inputs.npy"]
)
def test_a_flipped_bit_is_named(bundle: Path, file: str) -> None:
    flip(bundle / file)
    _, findings = check_bundle(bundle)
    assert findings[0].defect == "changed_file"
    assert findings[0].sentence.startswith(f"{file}: ")


def test_a_flipped_weight_under_new_digests_is_named(bundle: Path) -> None:
    model = onnx.load(bundle / "student_int8.onnx")
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    levels = np.frombuffer(head.raw_data, np.int8).copy()
    levels[:8] = -levels[:8]
    head.raw_data = levels.tobytes()
    put(bundle, model)
    seal(bundle)
    assert names(bundle) == {"golden_differs"}


@pytest.mark.parametrize("labels", [("dog", "cat", "gnu"), ("ant", "bee", "fly")])
def test_a_swapped_label_file_is_named(bundle: Path, labels: tuple[str, ...]) -> None:
    (bundle / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    assert names(bundle) == {"changed_file", "labels_differ"}
    seal(bundle)
    assert names(bundle) == {"labels_differ"}


@pytest.mark.parametrize("labels", [LABELS[:2], (*LABELS, "yak")])
def test_a_missing_or_added_class_is_named(bundle: Path, labels: tuple[str, ...]) -> None:
    (bundle / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    seal(bundle)
    assert names(bundle) == {"missing_class"}


def test_a_network_that_lost_a_class_is_named(bundle: Path) -> None:
    put(bundle, classifier(size=SIZE, classes=2), "teacher_fp32")
    seal(bundle)
    assert "missing_class" in names(bundle)


def test_a_float_convolution_sneaked_in_is_named(bundle: Path) -> None:
    put(bundle, quantized_network(63, plain=("conv2",)))
    seal(bundle)
    _, findings = check_bundle(bundle)
    # ONNX Runtime quantizes the float weights of this one by itself, on the full range.
    assert {finding.defect for finding in findings} == {"float_layers", "saturating_weights"}
    assert "1 layers compute in float that bundle.json does not name: conv2" in findings[-1].sentence


def test_a_convolution_whose_output_lost_its_grid_is_named(bundle: Path) -> None:
    put(bundle, quantized_network(63, plain=("quantizer_conv2",)))
    seal(bundle)
    assert "float_layers" in names(bundle)


def test_a_float_layer_that_was_promised_is_no_defect(bundle: Path) -> None:
    put(bundle, quantized_network(63, plain=("conv2", "quantizer_conv2")))
    assert "float_layers" in names(bundle)
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"]["student_int8"]["float_layers"] = ["conv2"]
    (bundle / "bundle.json").write_text(json.dumps(document))
    seal(bundle)
    assert names(bundle) == set()


def test_saturating_weights_are_named(bundle: Path) -> None:
    put(bundle, quantized_network(127))
    seal(bundle)
    _, findings = check_bundle(bundle)
    assert "saturating_weights" in {finding.defect for finding in findings}
    assert "off cpu_avx2's grid [-64, 63]" in findings[0].sentence
    assert "conv1 (127)" in findings[0].sentence


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_wrong_mean_or_std_is_named(bundle: Path, key: str) -> None:
    change(bundle, "preprocess.json", **{key: [0.5, 0.5, 0.5]})
    seal(bundle)
    assert names(bundle) == {"preprocess_differs"}


def test_a_wrong_mean_is_named_by_the_golden_inputs_where_the_files_say_nothing(bundle: Path) -> None:
    for path in bundle.glob("*.onnx"):
        model = onnx.load(path)
        del model.metadata_props[:]
        save(model, path)
    change(bundle, "preprocess.json", mean=[0.5, 0.5, 0.5])
    seal(bundle)
    assert names(bundle) == {"preprocess_differs"}


def test_a_wrong_mean_is_named_by_the_files_where_the_golden_inputs_were_made_anew(bundle: Path) -> None:
    mean = [0.5, 0.5, 0.5]
    change(bundle, "preprocess.json", mean=mean)
    images = np.load(bundle / "golden" / "images.npy").astype(np.float32)
    scaled = (images / np.float32(255) - np.array(mean, np.float32)) / np.array(SMALL["std"], np.float32)
    np.save(bundle / "golden" / "inputs.npy", np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
    seal(bundle)
    assert names(bundle) == {"preprocess_differs", "golden_differs"}


@pytest.mark.parametrize(("kernel", "defect"), [("bicubic", "preprocess_differs"), ("nearest", "bad_content")])
def test_another_interpolation_is_named(bundle: Path, kernel: str, defect: str) -> None:
    change(bundle, "preprocess.json", interpolation=kernel)
    seal(bundle)
    assert names(bundle) == {defect}


def test_a_file_for_another_machine_is_named(bundle: Path) -> None:
    save(tagged(quantized_network(63), target="cpu_arm"), bundle / "student_int8.onnx")
    seal(bundle)
    assert names(bundle) == {"target_differs"}


def test_a_file_of_another_run_is_named(bundle: Path) -> None:
    save(tagged(quantized_network(63), recipe_digest="def"), bundle / "student_int8.onnx")
    seal(bundle)
    _, findings = check_bundle(bundle)
    assert [finding.defect for finding in findings] == ["wrong_facts"]
    assert "student_int8.onnx was made by 'def', got 'abc'" in findings[0].sentence


def test_a_made_up_accuracy_is_named(bundle: Path) -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"]["teacher_fp32"]["score"] = 0.99
    (bundle / "bundle.json").write_text(json.dumps(document))
    seal(bundle)
    assert names(bundle) == {"accuracy_differs"}


def test_a_tolerance_that_lets_everything_through_is_named(bundle: Path) -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    document["golden"]["tolerance"]["student_int8"] = 1e9
    (bundle / "bundle.json").write_text(json.dumps(document))
    seal(bundle)
    assert names(bundle) == {"wrong_facts"}


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "weights.bin"])
def test_external_data_is_named(bundle: Path, location: str) -> None:
    model = onnx.load(bundle / "student_int8.onnx")
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.ClearField("raw_data")
    save_as_it_is(model, bundle / "student_int8.onnx")
    (bundle / "weights.bin").write_bytes(bytes(1000))
    seal(bundle)
    assert names(bundle) == {"external_data"}


def save_as_it_is(model: ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("file", ["student_int8.onnx", "labels.txt", "bundle.json", "SHA256SUMS", "golden/images.npy"])
def test_a_symbolic_link_is_named(bundle: Path, file: str) -> None:
    (bundle / file).rename(bundle.parent / "elsewhere")
    (bundle / file).symlink_to(bundle.parent / "elsewhere")
    assert names(bundle) >= {"link"}


def test_a_link_that_nothing_lists_is_named(bundle: Path) -> None:
    (bundle / "golden" / "home").symlink_to("/")
    assert names(bundle) == {"link"}


def test_a_file_that_no_digest_covers_is_named(bundle: Path) -> None:
    (bundle / "serving" / "model.py").write_text("print('a server would run this')\n")
    assert names(bundle) == {"unlisted_file"}


@pytest.mark.parametrize("copy", ["planted/1/model.onnx", "planted/1/model.cuda", "planted/labels.txt"])
def test_another_file_under_serving_is_named(bundle: Path, copy: str) -> None:
    path = bundle / "serving" / "triton" / copy
    path.write_bytes(b"other")
    seal(bundle)
    assert names(bundle) == {"other_copy"}


@pytest.mark.parametrize("data", [b"", bytes(64), b"garbage, no protobuf", b"\x08\x09", b"\x0a\x03\xff\xfe\xfd" * 9])
def test_a_garbage_model_is_named(bundle: Path, data: bytes) -> None:
    (bundle / "student_int8.onnx").write_bytes(data)
    seal(bundle)
    assert names(bundle) == {"not_onnx"}


@pytest.mark.parametrize("file", ["model.json", "model.textproto", "model.onnxtxt"])
def test_a_model_is_read_as_protobuf_whatever_its_name_ends_in(bundle: Path, file: str) -> None:
    (bundle / "student_int8.onnx").rename(bundle / file)
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"]["student_int8"]["file"] = file
    (bundle / "bundle.json").write_text(json.dumps(document))
    seal(bundle)
    assert names(bundle) == set()


@pytest.mark.parametrize("name", [b"Flatten", b"conv1.weight", b"logits"])
def test_a_name_that_is_no_text_is_named(bundle: Path, name: bytes) -> None:
    path = bundle / "student_int8.onnx"
    assert name in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(name, b"\xff" * len(name)))
    seal(bundle)
    assert names(bundle) == {"not_onnx"}


def test_a_model_of_a_million_empty_nodes_is_named(tmp_path: Path) -> None:
    nodes = b"\x0a\x00" * 10**6
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08\x09\x3a" + varint(len(nodes)) + nodes)
    with pytest.raises(BundleError, match="must have at most 100000 nodes, got 1000000"):
        require_sound(path)


def varint(number: int) -> bytes:
    """Return a protobuf varint."""
    groups = [(number >> shift) & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def test_a_protobuf_that_claims_two_gigabytes_is_named_at_once(bundle: Path) -> None:
    (bundle / "student_int8.onnx").write_bytes(b"\x08\x09\x3a" + varint(GIGABYTES_2 - 16) + b"\x0a\x02ab")
    seal(bundle)
    assert names(bundle) == {"not_onnx"}


@pytest.mark.parametrize("dims", [[GIGABYTES_2], [2**20, 2**20, 2**20], [-1], [2**62, 2**62]])
def test_a_tensor_that_claims_more_than_it_holds_is_named(bundle: Path, dims: list[int]) -> None:
    model = quantized_network(63)
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    put(bundle, model)
    seal(bundle)
    assert names(bundle) == {"too_large"} if min(dims) > 0 else {"not_onnx"}


def test_an_array_that_claims_two_gigabytes_is_named_before_it_is_read(bundle: Path) -> None:
    path = bundle / "golden" / "student_int8.npy"
    header = {"descr": "<f4", "fortran_order": False, "shape": (GIGABYTES_2 // 4, 1)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(bytes(64))
    seal(bundle)
    assert names(bundle) == {"bad_content"}


def test_a_file_of_terabytes_is_named_unread(bundle: Path) -> None:
    with (bundle / "student_int8.onnx").open("r+b") as stream:
        stream.truncate(2**40)  # sparse: takes no room, and hashing it would take an hour
    assert "too_large" in names(bundle)


def test_all_defects_are_named_at_once(bundle: Path) -> None:
    put(bundle, quantized_network(127, plain=("conv2",)))
    (bundle / "labels.txt").write_text("dog\ncat\ngnu\n")
    change(bundle, "preprocess.json", mean=[0.5, 0.5, 0.5])
    (bundle / "extra.onnx").symlink_to("/etc/passwd")
    seal(bundle)
    flip(bundle / "golden" / "images.npy")
    planted = {"labels_differ", "float_layers", "saturating_weights", "preprocess_differs", "link", "changed_file"}
    assert names(bundle) >= planted


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export.check", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_the_command_names_the_defects_and_exits_with_3(bundle: Path) -> None:
    whole = run_check(bundle)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, f"{bundle}: no problems found\n", "")
    (bundle / "labels.txt").write_text("dog\ncat\n")
    seal(bundle)
    broken = run_check(bundle)
    assert broken.returncode == 3
    assert broken.stdout.startswith("missing_class: labels.txt: ")
    assert broken.stderr == ""


def bomb() -> ModelProto:
    """Return a network that fills 4 terabytes with zeros before it answers."""
    node = helper.make_node
    nodes = [
        node("ConstantOfShape", ["shape"], ["zeros"]),
        node("ReduceMax", ["zeros"], ["none"], keepdims=0),
        node("GlobalAveragePool", ["input"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Add", ["f", "none"], ["logits"]),
    ]
    return model_of(nodes, {"shape": np.array([2**20, 2**20])}, shape=(3, SIZE, SIZE), classes=3)


def endless() -> ModelProto:
    """Return a network that counts to 2^62 before it answers."""
    node, info = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Add", ["carried", "one"], ["next"])],
        "body",
        [info("turn", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("carried", TensorProto.FLOAT, [])],
        [info("go_on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, [])],
    )
    nodes = [
        node("GlobalAveragePool", ["input"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("ReduceMax", ["f"], ["start"], keepdims=0),
        node("Loop", ["turns", "true", "start"], ["end"], body=body),
        node("Add", ["f", "end"], ["logits"]),
    ]
    weights = {"turns": np.array(2**62), "true": np.array(True), "one": np.array(1, np.float32)}
    return model_of(nodes, weights, shape=(3, SIZE, SIZE), classes=3)


@pytest.mark.parametrize(("model", "defect"), [(bomb, "out_of_memory"), (endless, "timed_out")])
def test_a_model_that_would_take_the_machine_is_named(
    tmp_path: Path, model: Callable[[], ModelProto], defect: str
) -> None:
    paths = [save(model(), tmp_path / "bad.onnx"), save(classifier(), tmp_path / "good.onnx")]
    bad, good = vet(paths, ChildLimits(cpu_seconds=2))
    assert isinstance(bad, BundleError)
    assert bad.defect == defect
    assert str(bad).startswith("bad.onnx: ")
    assert not isinstance(good, BundleError)


@pytest.mark.slow
def test_an_endless_file_is_refused_after_seconds_of_processor_time(tmp_path: Path) -> None:
    path = save(endless(), tmp_path / "bad.onnx")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(BundleError, match=r"^bad\.onnx: takes more than 10 s of processor time to load and run once: "):
        require_sound(path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 13


@pytest.mark.parametrize(("side", "seconds"), [(224, 0), (1024, 10), (4096, 50)])
def test_a_file_gets_processor_time_for_its_macs(side: int, seconds: int) -> None:
    """One convolution of 256 by 3 channels and 5 by 5 taps: 19,200 MACs a pixel, half a second for 10^9, at most 50 s."""
    node, weights = helper.make_node, {"conv": np.zeros((256, 3, 5, 5), np.float32)}
    nodes = [
        node("Conv", ["input", "conv"], ["c"], pads=[2, 2, 2, 2]),
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Flatten", ["g"], ["logits"]),
    ]
    assert seconds_for_macs(model_of(nodes, weights, shape=(3, side, side), classes=256), ChildLimits()) == seconds


def test_a_network_whose_macs_cannot_be_counted_gets_no_more_processor_time() -> None:
    nodes = [
        helper.make_node("Resize", ["input", "", "factors"], ["large"]),
        helper.make_node("Conv", ["large", "conv"], ["logits"], domain="of.another"),
    ]
    assert seconds_for_macs(model_of(nodes, {}, shape=(3, 8, 8), classes=3), ChildLimits()) == 0
    assert seconds_for_macs(endless(), ChildLimits()) == 0


@pytest.mark.parametrize(
    ("script", "defect"),
    [("kill -SEGV $$", "crashed"), ("kill -KILL $$", "out_of_memory"), ("exit 1", "crashed"), ("echo 7", "crashed")],
)
def test_a_crash_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, defect: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BundleError, match=r"^a\.onnx: [^\n]*$") as caught:
        require_sound(save(classifier(), tmp_path / "a.onnx"))
    assert caught.value.defect == defect


def test_the_guarded_process_can_write_no_file(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from export.bundle.sandbox import ChildLimits, confine; confine([], ChildLimits()); "
        f"Path({str(tmp_path / 'written')!r}).write_text('x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert "File too large" in done.stderr
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


def test_a_module_in_the_bundle_is_not_run(bundle: Path) -> None:
    (bundle / "json.py").write_text("raise SystemExit('taken over')\n")
    command = "from export.bundle.sandbox import vet; from pathlib import Path; print(vet([Path('student_int8.onnx')]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        cwd=bundle,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "ModelFile(" in done.stdout, done.stderr


def test_a_foreign_name_cannot_drive_the_terminal(bundle: Path) -> None:
    (bundle / "labels.txt").write_text("cat\n\x1b[2Jdog\ngnu\n")
    seal(bundle)
    assert "\x1b" not in run_check(bundle).stdout
