"""Check an untrusted bundle: complete, sound, consistent, and as its documents say."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from export.bundle.inside import read_sums
from export.bundle.read import Bundle, examine, tried
from export.bundle.sandbox import vet
from export.check.promises import broken_promises, other_answers
from export.errors import BundleError, Defect
from export.names import LABELS, SIGNATURE, SUMS
from export.runtime.providers import PLAIN, Runtime
from export.serving.triton import answering_model


@dataclass(frozen=True)
class Problem:
    """One problem: its name for programs, its sentence for people."""

    defect: Defect
    sentence: str


def check_bundle(path: Path, runs_in: Runtime = PLAIN) -> tuple[Bundle | None, list[Problem]]:
    """Return the bundle and no findings, or None and all findings; a broken bundle raises nothing.

    Golden inputs run on the CPU and in `runs_in`. Model files are opened in the sandbox first. Raises BundleError if this machine's ONNX Runtime cannot judge them.
    """
    amiss: dict[str, BundleError] = {}  # by sentence, since one cause can show up twice

    def note(error: BundleError) -> None:
        if error.defect == "wrong_runtime":
            raise error
        amiss.setdefault(str(error), error)

    def note_all(errors: Iterable[BundleError]) -> None:
        for error in errors:
            note(error)

    bundle = examine(path, amiss=note, inspect=vet)
    if path.is_dir():
        tried(note, note_all, astray(path, bundle))
    if bundle is not None:
        tried(note, note_all, other_answers(bundle))
        for name in bundle.files:
            tried(note, note_all, broken_promises(bundle, name, runs_in))
    findings = [Problem(error.defect, sentence) for sentence, error in amiss.items()]
    return (None if findings else bundle), findings


def astray(folder: Path, bundle: Bundle | None) -> Iterator[BundleError]:
    """Yield every link, every file without a digest, and every file that a server would use but that differs from the bundle's.

    The model that gives predictions is no copy: `other_answers` compares it if there is a sound `bundle`.
    """
    digests = read_sums(folder)
    known = {*digests, SUMS, SIGNATURE}
    for place, folders, files in os.walk(folder):
        for name in sorted(files) + sorted(folders):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                sentence = f"{relative}: must be a regular file, not a link: get the bundle again"
                yield BundleError(sentence, defect="link")
            elif name in files and relative not in known:
                yield BundleError(f"{SUMS}: lists no {relative}: remove it", defect="unlisted_file")
    models = {digest for name, digest in digests.items() if "/" not in name}
    predicting = answering_model(bundle.name if bundle else "*")
    for name, digest in digests.items():
        last = PurePosixPath(name).name
        if PurePosixPath(name).match(predicting):
            continue
        if last.startswith("model.") and last != "model.py" and digest not in models:
            yield BundleError(
                f"{name}: is not one of the bundle's model files: get the bundle again", defect="other_copy"
            )
        if last == LABELS and digest != digests.get(LABELS):
            yield BundleError(f"{name}: differs from {LABELS}: get the bundle again", defect="other_copy")
