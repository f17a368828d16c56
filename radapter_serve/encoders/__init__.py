"""The graphs of a release, run in this process by ONNX Runtime, OpenVINO or TensorRT, or asked of a
live server.

Nothing here knows of tasks, and nothing imports torch.
"""
