"""Interoperability: a notebook's weights, closed forms in an FM, safetensors, ONNX."""
