"""List images with the boxes of YOLO's text files."""

from importlib.util import find_spec
from pathlib import Path

from export.errors import DataError
from export.images.box_listing import (
    ALL,
    BoxFile,
    BoxListing,
    Drawn,
    checked,
    listing_of,
    only,
    split_of,
    text_of,
    used_splits,
)
from export.images.folders import images_in

FOLDER = "labels"


def yolo_splits(root: Path) -> dict[str, list[Path]]:
    """Return each split's folders of images that have labels: images/train, train/images, or images for all."""
    found = dict[str, list[Path]]()
    for images in sorted([*root.glob("images/*/"), *root.glob("*/images/")]):
        split = split_of(images.name if images.parent.name == "images" else images.parent.name)
        if split and images.is_dir() and _labels(root, images).is_dir():
            found.setdefault(split, []).append(images)
    if not found and (root / "images").is_dir() and (root / FOLDER).is_dir():
        found[ALL] = [root / "images"]
    return found


def _labels(root: Path, images: Path) -> Path:
    """Return the folder of the labels of a folder of images."""
    return root / FOLDER / images.name if images.parent == root / "images" else images.with_name(FOLDER)


def list_yolo(root: Path) -> BoxListing:
    """List the images of a folder with label files."""
    splits, notes = used_splits(root, yolo_splits(root))
    classes = _classes(root)
    parts = {split: _files(root, only(root, split, found), classes) for split, found in splits.items()}
    return listing_of(root, classes, parts, notes)


def _classes(root: Path) -> list[str]:
    """Return the classes' names in the order of their indices. Raises DataError where two files name other ones."""
    found = dict[Path, list[str]]()
    for file in (root / name for name in ("classes.txt", f"{FOLDER}/classes.txt", "obj.names")):
        if file.is_file() and (names := [line.strip() for line in text_of(file).splitlines() if line.strip()]):
            found[file] = names
    for file in sorted(path for path in root.glob("*") if path.suffix in (".yaml", ".yml") and path.name[0] != "."):
        if found and find_spec("yaml") is None:
            break
        if names := _yaml_names(file):
            found[file] = names
    if not found:
        raise DataError(
            f"{root}: does not name its classes: write them into classes.txt, one per line in the order of their indices"
        )
    (file, names), *others = found.items()
    if differing := [other for other, its in others if its != names]:
        raise DataError(f"{root}: {file.name} and {differing[0].name} name other classes: remove the one that is wrong")
    return names


def _yaml_names(file: Path) -> list[str]:
    """Return the names in a YAML file, as they are written and by their indices, none if it has none."""
    if find_spec("yaml") is None:
        raise DataError(f"{file}: reading YAML needs PyYAML: pip install pyyaml")
    import yaml

    try:
        whole = yaml.compose(text_of(file), Loader=yaml.BaseLoader)  # texts alone: `no` is a name, and nothing is run
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as YAML ({error}): repair or remove it") from error
    entries = whole.value if isinstance(whole, yaml.MappingNode) else []
    node = next((value for key, value in entries if key.value == "names"), None)
    if node is None:
        return []
    pairs = [(str(place), value) for place, value in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, value) for key, value in node.value]
    if isinstance(node, yaml.ScalarNode) or not all(isinstance(value, yaml.ScalarNode) for _, value in pairs):
        raise DataError(f"{file}: names: must be a list of names, or of `index: name`: write it so")
    wanted, by_index = [str(place) for place in range(len(pairs))], {str(key): value.value for key, value in pairs}
    if missing := [place for place in wanted if place not in by_index]:
        raise DataError(
            f"{file}: names: has no index {missing[0]}, but {len(pairs)} names: number them from 0 without gaps"
        )
    return [by_index[place] for place in wanted]


def _files(root: Path, images: Path, classes: list[str]) -> list[BoxFile]:
    """Return one split's images; an image without a label file has no box."""
    labels = _labels(root, images)
    found = dict[Path, BoxFile]()
    for path in images_in(root, images):
        file = labels / (root / path).relative_to(images).with_suffix(".txt")
        if file in found:
            raise DataError(f"{root}: {found[file].path} and {path} have the same labels: rename or remove one")
        lines = text_of(file).splitlines() if file.is_file() else []
        drawn = [
            _drawn(f"{file}: line {number}", line, classes) for number, line in enumerate(lines, 1) if line.strip()
        ]
        source = str(file.relative_to(root)) if file.is_file() else path
        found[file] = BoxFile(path, source, None, drawn)
    return list(found.values())


def _drawn(where: str, line: str, classes: list[str]) -> Drawn:
    """Return a line's box."""
    try:
        label, *numbers = (float(part) for part in line.split())
    except ValueError:
        raise DataError(f"{where}: must be `class x y width height`, got {line!r:.60}") from None
    if len(numbers) != 4:
        raise DataError(f"{where}: must be `class x y width height`, got {len(numbers) + 1} numbers")
    if not (label.is_integer() and 0 <= label < len(classes)):
        raise DataError(f"{where}: names the class {label:g}, but there are {len(classes)} (0 to {len(classes) - 1})")
    x, y, across, down = numbers
    corners = (x - across / 2, y - down / 2, x + across / 2, y + down / 2)
    return Drawn(classes[int(label)], checked(where, corners, (1, 1)))
