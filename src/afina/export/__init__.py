"""From a run folder to what other programs read: merged models, int8, ONNX, GGUF; each answers as the run does, or is not written."""
