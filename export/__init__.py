import os

# Read by ONNX Runtime 1.32 on import; otherwise it stores a machine id and a database of events below HOME.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
