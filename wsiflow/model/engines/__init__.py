"""Engines that run a network: PyTorch, OpenVINO and ONNX Runtime."""
