"""The names of files and keys that one room writes and another reads, each spelt here alone."""

from typing import Final

# In a bundle; export/bundle/read.py says what each is.
MANIFEST: Final = "bundle.json"
PREPROCESS: Final = "preprocess.json"  # also in the folder of the export stage
LABELS: Final = "labels.txt"  # also there
VALIDATION: Final = "validation.txt"  # also there
DECODER: Final = "decode.onnx"  # also there; a detector's own graph from its outputs to boxes
SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "model.sig"

# In a run's folder; the first three also in its bundle.
RECIPE_YAML: Final = "recipe.yaml"
REPORT_JSON: Final = "report.json"
PAGE: Final = "report/index.html"
COMPARISON_JSON: Final = "comparison.json"
BUNDLE: Final = "bundle"

# In a stage's folder.
LOG_JSONL: Final = "log.jsonl"
PLAN_JSON: Final = "plan.json"  # prune: the widths
LATENCY_JSON: Final = "latency.json"  # prune: each layer's time
PTQ_JSON: Final = "ptq.json"
AUDIT_JSON: Final = "audit.json"  # export, like the next four
VERIFY_JSON: Final = "verify.json"
LIMITS_JSON: Final = "limits.json"
NOTES_JSON: Final = "notes.json"
GOLDEN_NPZ: Final = "golden.npz"
BENCH_JSON: Final = "bench.json"
EXAMPLES_NPZ: Final = "examples.npz"  # bench: images with their predictions
ANSWERS: Final = "answers"  # in it, followed by an output's name where there are several

# In an ONNX file's metadata.
TASK_KEY: Final = "task"
CLASSES_KEY: Final = "classes"
PREPROCESS_KEY: Final = "preprocess"
SCORE_KEY: Final = "score_torch"
TARGET_KEY: Final = "target"
RECIPE_KEY: Final = "recipe_digest"
