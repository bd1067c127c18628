import os

# Read when ONNX Runtime 1.32 is imported: it would keep an id of the machine and a database of events below HOME.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
