import export as export  # it switches ONNX Runtime's telemetry off, before anything imports that
