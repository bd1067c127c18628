"""Teachers in other programs' files: what they answer, when they are refused, and a run that one of them teaches."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from networks import small
from onnx import TensorProto, helper
from torch import Tensor, nn

from compress.data.teachers import GivenTeacher
from compress.errors import CompressError, ModelError, RecipeError
from compress.models.architectures import build
from compress.models.teachers import Seen, Teacher, teacher_of
from compress.pipeline import run_recipe
from compress.quant.graph.trace import trace
from compress.recipe.read import read_recipe
from compress.run import open_run
from export.onnx_file.to_onnx import to_onnx

NETWORKS = Path(__file__).parent.parent / "networks.py"
SEEN = Seen((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES = tuple("0123456789")
RECIPE = f"""
name: taught
target: cpu_avx2
data: {{dataset: digits, image_size: 16, limit_per_class: 100}}
stages:
  - {{stage: source}}
  - {{stage: student, arch: "{NETWORKS}:small"}}
  - {{stage: distill, fit: {{epochs: 2, batch_size: 32, lr: 0.05}}}}
  - {{stage: ptq, calibration_images: 64, methods: [minmax]}}
  - {{stage: export, verify_images: 32}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


def given(network: str, **fields: Any) -> GivenTeacher:
    known = dict.fromkeys(("weights", "image_size", "mean", "std", "classes"))
    return GivenTeacher(network, **known | fields)


def taught(*teachers: GivenTeacher, classes: tuple[str, ...] = CLASSES, student: Seen = SEEN) -> Teacher:
    return teacher_of(teachers, classes, student, trust_code=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(learned: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network of the digits in several forms."""
    folder, network = tmp_path_factory.mktemp("saved"), small(10)
    network.load_state_dict(learned)
    save_all(network.eval(), folder)
    return folder


def save_all(network: nn.Module, folder: Path) -> None:
    to_onnx(network, folder / "network.onnx", shape=(3, 16, 16), metadata={})
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=batch)
    torch.export.save(program, folder / "network.pt2")
    torch.save(network.state_dict(), folder / "network.pt")
    for name, last in (("keras", "Softmax"), ("sigmoids", "Sigmoid")):
        keras = onnx.load(folder / "network.onnx")
        channels_last_(keras, helper.make_node(last, ["before"], [keras.graph.output[0].name]))
        onnx.save(keras, folder / f"{name}.onnx")


def channels_last_(proto: onnx.ModelProto, last: onnx.NodeProto) -> None:
    """Have a file take (n, height, width, channels) and end in one more operator, as Keras's exports do."""
    (entry,), (out,) = proto.graph.input, proto.graph.output
    for node in proto.graph.node:
        node.input[:] = ["first" if name == entry.name else name for name in node.input]
        node.output[:] = ["before" if name == out.name else name for name in node.output]
    proto.graph.node.insert(0, helper.make_node("Transpose", [entry.name], ["first"], perm=[0, 3, 1, 2]))
    proto.graph.node.append(last)
    shape = helper.make_tensor_value_info(entry.name, TensorProto.FLOAT, ["batch", 16, 16, 3])
    proto.graph.input[0].CopyFrom(shape)


@pytest.mark.parametrize("form", ["onnx:{}/network.onnx", "exported:{}/network.pt2"])
def test_a_file_predicts_what_its_network_does(form: str, saved: Path, images: Tensor) -> None:
    network = build(f"{NETWORKS}:small", num_classes=10, trust_code=True)
    network.load_state_dict(torch.load(saved / "network.pt", weights_only=True))
    with torch.no_grad():
        expected, found = network.eval()(images), taught(given(form.format(saved)))(images)
    assert (found - expected).abs().max() < 1e-4


def test_a_keras_file_takes_channels_last_and_its_probabilities_become_logits(saved: Path, images: Tensor) -> None:
    plain, keras = taught(given(f"onnx:{saved}/network.onnx")), taught(given(f"onnx:{saved}/keras.onnx"))
    with torch.no_grad():
        keras.note_probabilities_(images)
        assert (keras(images) - plain(images).log_softmax(1)).abs().max() < 1e-4


@pytest.mark.parametrize("count", [10, 7])
def test_probabilities_of_some_of_a_teachers_classes_become_logits(
    count: int, saved: Path, tmp_path: Path, images: Tensor
) -> None:
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    named = given(f"onnx:{saved}/keras.onnx", classes=tmp_path / "names.txt")
    wanted, plain = CLASSES[::-1][:count], taught(given(f"onnx:{saved}/network.onnx"))
    some = taught(named, classes=wanted)
    with torch.no_grad():
        some.note_probabilities_(images)
        assert (some(images) - plain(images).log_softmax(1).flip(1)[:, :count]).abs().max() < 1e-4


def test_sigmoids_at_a_files_end_are_taken_off(saved: Path, images: Tensor) -> None:
    with torch.no_grad():
        expected = taught(given(f"onnx:{saved}/network.onnx"))(images)
        teacher = taught(given(f"onnx:{saved}/sigmoids.onnx"))
        teacher.note_probabilities_(images)
        network = build(f"onnx:{saved}/sigmoids.onnx", num_classes=10)
        assert (teacher(images) - expected.clamp(-13.8, 13.8)).abs().max() < 0.05  # as far as float32 resolves
        assert (network(images) - expected).abs().max() < 1e-4


def test_an_onnx_file_is_rebuilt_with_weights_that_can_be_trained(saved: Path, images: Tensor) -> None:
    network = build(f"onnx:{saved}/keras.onnx", num_classes=10)
    with torch.no_grad():
        expected = taught(given(f"onnx:{saved}/keras.onnx"))(images)
        assert (network(images).softmax(1) - expected).abs().max() < 1e-4
    assert sum(parameter.requires_grad for parameter in network.parameters()) > 10


@pytest.mark.parametrize("kind", ["ResNet", "ViT"])
def test_a_folder_of_transformers_answers_with_its_logits(kind: str, tmp_path: Path, images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    each: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "ViT": {**small, "image_size": 16, "patch_size": 8},
    }
    names = {index: f"c{9 - index}" for index in range(10)}
    config = getattr(transformers, f"{kind}Config")(**each[kind], id2label=names)
    network = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    network.save_pretrained(tmp_path)
    teacher = taught(given(f"hf:{tmp_path}"), classes=tuple(f"c{index}" for index in range(10)))
    with torch.no_grad():
        assert torch.allclose(teacher(images), network(images).logits.flip(1), atol=1e-6)


def test_a_teacher_sees_its_own_size_and_normalization(saved: Path, images: Tensor) -> None:
    student = Seen((8, 8), (0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    alone = taught(given(f"onnx:{saved}/network.onnx"))
    seen = taught(
        given(f"onnx:{saved}/network.onnx", image_size=(16, 16), mean=SEEN.mean, std=SEEN.std), student=student
    )
    pixels = images[:, :, ::2, ::2].sigmoid()
    mine, its = (
        (pixels - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]
        for m, s in ((student.mean, student.std), (SEEN.mean, SEEN.std))
    )
    with torch.no_grad():
        expected = alone(torch.nn.functional.interpolate(its, (16, 16), mode="bilinear"))
        assert torch.allclose(seen(mine), expected, atol=1e-4)


def test_classes_in_another_order_are_put_in_the_students(saved: Path, tmp_path: Path, images: Tensor) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(("other", *CLASSES[::-1], "more")[1:-1]))
    plain, turned = (
        taught(given(f"onnx:{saved}/network.onnx")),
        taught(given(f"onnx:{saved}/network.onnx", classes=listed)),
    )
    assert torch.equal(turned(images), plain(images).flip(1))
    with pytest.raises(ModelError, match=r"has 10 classes and lacks 1 of the data's 2: cat; use the data"):
        taught(given(f"onnx:{saved}/network.onnx", classes=listed), classes=("1", "cat"))


def test_several_teachers_answer_with_softmaxs_geometric_mean(saved: Path, images: Tensor) -> None:
    torch.manual_seed(3)
    one, other = small(10).eval(), taught(given(f"onnx:{saved}/network.onnx"))
    torch.save(one.state_dict(), saved / "other.pt")
    both = taught(given(f"{NETWORKS}:small", weights=str(saved / "other.pt")), given(f"onnx:{saved}/network.onnx"))
    with torch.no_grad():
        product = (one(images).softmax(1) * other(images).softmax(1)).sqrt()
        expected = product / product.sum(1, keepdim=True)
        assert torch.allclose(both(images).softmax(1), expected, atol=1e-5)


@pytest.mark.parametrize("key", [b'"expr_str"', b'"expr\\u005fstr"'])
def test_an_archive_whose_shapes_are_code_is_refused(key: bytes, saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(saved / "network.pt2") as read, zipfile.ZipFile(bad, "w") as written:
        for name in read.namelist():
            content = read.read(name)
            if "/models/" in name:
                content = content.replace(b'"expr_str": "Symbol(', key + b': "print(')
            written.writestr(name, content)
    with pytest.raises(ModelError, match="needs code to be read"):
        build(f"exported:{bad}", num_classes=10)


def test_an_operator_that_cannot_be_rebuilt_is_named(tmp_path: Path) -> None:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])
    answers = helper.make_tensor_value_info("answers", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("Det", ["images"], ["answers"])], "graph", [images], [answers])
    file = tmp_path / "det.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    with pytest.raises(ModelError, match=r"onnx2torch cannot rebuild it \(.*Det.*\), so it cannot be cut or trained"):
        build(f"onnx:{file}", num_classes=10)


def test_a_file_for_other_channels_is_refused(tmp_path: Path, images: Tensor) -> None:
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 16, 16]) for name in ("images", "answers")
    ]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["answers"])], "graph", shapes[:1], shapes[1:])
    file = tmp_path / "grey.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    with pytest.raises(ModelError, match="takes images of 1 channels, got 3: give a network for these images"):
        taught(given(f"onnx:{file}"))(images)


def test_a_teacher_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    to_onnx(small(7).eval(), tmp_path / "seven.onnx", shape=(3, 16, 16), metadata={})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path}", f"teacher=onnx:{tmp_path}/seven.onnx"])
    with pytest.raises(CompressError, match=r"teacher onnx:.*\(n, 10\), returned shape \(1, 7\).*`classes`"):
        open_run(recipe, trust_code=True, verbose=False).given_teacher()


def test_pruning_a_teacher_that_only_answers_is_refused_in_one_sentence(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(f'{{stage: student, arch: "{NETWORKS}:small"}}', "{stage: prune, keep_macs: 0.5}"))
    with pytest.raises(RecipeError, match=r"stages\.1: prune needs a network, and `teacher` only gives predictions"):
        read_recipe(path, [f"teacher=onnx:{saved}/network.onnx"])


def test_a_students_run_is_taught_by_a_file(tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = read_recipe(path, [f"out={tmp_path}", f"teacher=onnx:{saved}/keras.onnx", "distill.fit.epochs=8"])
    assert run_recipe(recipe, trust_code=True, until=None, verbose=False, command="") == 0
    assert "on 359 validation images" in capsys.readouterr().err
    report = json.loads((tmp_path / "taught" / "report.json").read_text())
    scores = {row["name"]: row["score"] for row in report["deployed"]}
    assert scores["student_ptq_int8"] > 0.8
    assert report["stages"][0]["metrics"]["score"] == pytest.approx(scores["teacher_fp32"])
    upside_down = [
        f"out={tmp_path}",
        f"teacher={{network: onnx:{saved}/keras.onnx, classes: {tmp_path}/c.txt}}",
        "name=other",
    ]
    (tmp_path / "c.txt").write_text("\n".join(np.roll(CLASSES, 1)))
    with pytest.raises(CompressError, match=r"teacher onnx:.*, no better than chance: check its image_size"):
        run_recipe(read_recipe(path, upside_down), trust_code=True, until=None, verbose=False, command="")


def test_axes_that_a_file_holds_as_tensors_are_numbers_to_who_traces_it(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        averaged (float[N, 3, 16, 16] images) => (float[N, 3] logits)
        <int64[1] last = {3}, int64[1] third = {2}> {
            means = ReduceMean <axes = [2, 3], keepdims = 1> (images)
            rows = Squeeze (means, last)
            logits = Squeeze (rows, third)
        }""")
    onnx.save(model, tmp_path / "squeezed.onnx")
    network = build(f"onnx:{tmp_path}/squeezed.onnx", num_classes=3)
    images = torch.randn(4, 3, 16, 16)
    assert torch.allclose(trace(network, images[:1])(images), images.mean((2, 3)), atol=1e-6)
