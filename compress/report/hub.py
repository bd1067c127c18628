"""Publish a finished run's bundle to a repository on Hugging Face's hub, where its README.md is the model card."""

import importlib
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import ArtifactError
from compress.report.bundling import publish
from export.names import BUNDLE

HUB = "hf://"


def publish_to_hub(run: Path, to: str, *, key: Path | None, dry_run: bool) -> list[str]:
    """Replace the content of `hf://USER/NAME` by the run's bundle, and return lines for the user; a dry run contacts no server.

    Raises ArtifactError and BundleError as `publish` does, and ArtifactError for a wrong name or if the hub refuses or cannot be reached.
    """
    # A dependency of timm. It has its modules as attributes only once they are imported.
    hub, utils = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.utils"))
    repository = to.removeprefix(HUB)
    try:
        utils.validate_repo_id(repository)
        if repository.count("/") != 1:
            raise ValueError("needs a user and a model")
    except ValueError as error:
        raise ArtifactError(f"--to {to}: {error}; give hf://USER/NAME") from error
    with TemporaryDirectory() as folder:
        bundle = Path(folder, BUNDLE)
        publish(run, bundle, key=key)
        files = sorted(path for path in bundle.rglob("*") if path.is_file())
        if dry_run:
            sizes = (f"{path.stat().st_size:>13,}  {path.relative_to(bundle)}" for path in files)
            return [*sizes, f"{to}: would get these {len(files)} files; nothing was sent"]
        try:
            api = hub.HfApi()
            api.create_repo(repository, exist_ok=True)
            said = f"The bundle of {run.name}"
            api.upload_folder(repo_id=repository, folder_path=bundle, commit_message=said, delete_patterns=["*"])
        except Exception as error:  # the client raises its own errors, httpx's and OSError
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ArtifactError(f"{to}: {reason}; check the name, the network and `hf auth whoami`") from error
    return [f"{to}: {len(files)} files"]
