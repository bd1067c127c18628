"""Find and remove files in a run's folder that no report uses: stages of other settings, remains of killed runs."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from compress.artifact import exclusive
from compress.errors import ArtifactError
from export.names import REPORT_JSON

STAGE = r"\d\d-[a-z]+-[0-9a-f]{12}"
# Name pattern to description. Nothing else in the folder is touched.
LEFTOVERS = {
    re.compile(STAGE): "a stage that no report uses",
    re.compile(rf"\.{STAGE}\.partial"): "an interrupted stage; its run would resume from here",
    re.compile(r"\.bundle-.+|\..+\.\d+\.partial"): "a file that a killed run was writing",
}


class Leftover(NamedTuple):
    """A file or folder that no report uses."""

    path: Path
    what: str
    bytes: int


def leftovers(root: Path) -> list[Leftover]:
    """Return the files and folders that no report in a run's folder uses.

    Raises ArtifactError if there is no report, which alone tells what is used, or if one cannot be read.
    """
    places = [root, *sorted((root / "students").glob("*/"))]
    reports = [place / REPORT_JSON for place in places if (place / REPORT_JSON).exists()]
    if not reports:
        raise ArtifactError(
            f"{root}: has no report to tell which stages are used; run the recipe to its end, or remove the folder"
        )
    used = {path.resolve() for report in reports for path in _stages(report)}
    return [
        Leftover(path, what, sum(file.lstat().st_size for file in (path, *path.rglob("*")) if file.is_file()))
        for place in places
        for path in sorted(place.iterdir())
        for name, what in LEFTOVERS.items()
        if name.fullmatch(path.name) and not path.is_symlink() and path.resolve() not in used
    ]


def remove(root: Path) -> list[Leftover]:
    """Remove and return the files and folders that no report in a run's folder uses; ArtifactError if a run is writing there."""
    leftovers(root)  # refuses a folder without a run before a lock file is written there
    with exclusive(root):
        found = leftovers(root)
        for leftover in found:
            if leftover.path.is_dir():
                shutil.rmtree(leftover.path)
            else:
                leftover.path.unlink()
    return found


def _stages(report: Path) -> Iterator[Path]:
    """Yield the folders of a report's stages."""
    try:
        for row in json.loads(report.read_text(encoding="utf-8"))["stages"]:
            yield report.parent / row["directory"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{report}: cannot be read ({error}); run its recipe again") from error
