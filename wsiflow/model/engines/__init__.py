"""What runs a network: PyTorch, OpenVINO and ONNX Runtime."""
