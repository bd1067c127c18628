"""A provider that is the CPU's under another name, whose outputs a test alters."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from export.onnx_file.rounding import rounded
from export.runtime import providers
from export.runtime.providers import BF16, PLAIN, PROVIDERS, Provider, Runtime
from export.runtime.session import open_session

Change = Callable[[np.ndarray, Runtime], np.ndarray]


class Altered:
    """A session whose outputs are `change` of the right ones."""

    def __init__(self, session: onnxruntime.InferenceSession, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.session, self.change = session, change

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.change(output) for output in self.session.run(names, inputs)]

    def __getattr__(self, name: str) -> object:
        return getattr(self.session, name)


def plant(
    monkeypatch: pytest.MonkeyPatch, modules: Sequence[ModuleType], change: Change, name: str = "OtherExecutionProvider"
) -> Provider:
    """Add the row `other`, which computes in bf16 too (by rounding constants), to the table; the modules open it."""
    row = Provider("other", name, "Other", "onnxruntime", bf16=BF16 | {"other"})
    known = providers.missing
    monkeypatch.setitem(PROVIDERS, "other", row)
    monkeypatch.setattr(providers, "host_instruction_sets", lambda: frozenset({"other"}))
    monkeypatch.setattr(providers, "missing", lambda asked: None if asked is row else known(asked))

    def planted(model: Path | bytes, *, runs_in: Runtime = PLAIN, **options: object) -> object:
        if runs_in.provider is not row:
            return open_session(model, runs_in=runs_in, **options)  # type: ignore[arg-type]
        if runs_in.arithmetic == "bf16" and isinstance(model, Path):
            model = rounded(onnx.load(model), 8).SerializeToString()
        return Altered(open_session(model, **options), lambda outputs: change(outputs, runs_in))  # type: ignore[arg-type]

    for module in modules:
        monkeypatch.setattr(module, "open_session", planted)
    return row
