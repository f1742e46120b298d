"""onnxruntime as a peer of the benchmarks: a file in a session that runs as the other sides do."""

from pathlib import Path
from typing import Any

import torch


def onnx_session(path: Path) -> Any:
    """The model of an ONNX file in onnxruntime, on torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
