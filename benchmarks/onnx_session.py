"""onnxruntime as a peer of the benchmarks: a file in a session that runs as the other sides do."""

from pathlib import Path
from typing import Any

import torch


def onnx_session(path: Path) -> Any:
    """The model of an ONNX file in onnxruntime, on torch's number of threads.

    Its threads spin while it runs, and by default for a while after, on the cores of the side whose turn is next, and
    ours then leaves these to them (docs/cpu.md, "Beside other programs"). Here they stop when a run ends, which costs
    it nothing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
