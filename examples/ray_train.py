"""`python -m fastddpm.train` as the work of a Ray cluster: pip install "ray[train]", then

    python examples/ray_train.py --workers 2 --out /shared/runs/cifar10 --preset cifar10 --data /shared/cifar10
    python examples/ray_train.py --workers 8 --gpu --out /shared/runs/bedrooms --preset lsun256 --data /shared/bedrooms

What follows --workers and --gpu are options of fastddpm.train. Ray starts the workers, tells each its rank and forms
the process group; the loop, the checkpoints and the log are fastddpm's, in --out, which all workers must see. When a
worker fails, Ray starts all of them again, and they go on from the last checkpoint.
"""

import argparse
import os
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train_loop_per_worker(config: dict[str, Any]) -> None:
    from fastddpm import train

    # The run is made when all workers have met inside fastddpm, so each of them sees the same here.
    resume = ["--resume"] if os.path.exists(os.path.join(config["out"], "config.json")) else []
    train.main([*config["options"], "--out", config["out"], *resume])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--out", required=True, help="the run's directory, on a disk that all workers see")
    options, rest = parser.parse_known_args()
    device = ["--device", "cuda" if options.gpu else "cpu"]
    result = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"out": os.path.abspath(options.out), "options": [*device, *rest]},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        # gloo beside NCCL: signals, errors and the state of a checkpoint are exchanged on the host.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if options.gpu else "gloo", timeout_s=600),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.max_failures)),
    ).fit()
    print(f"done: {result}")


if __name__ == "__main__":
    main()
