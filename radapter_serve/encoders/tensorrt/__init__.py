"""TensorRT: engines from ONNX graphs, built and checked on the GPU that serves them.

Only this folder imports TensorRT.
"""
