"""python -m fastddpm [COMMAND], or fastddpm [COMMAND]: run a command, or list the commands."""

import runpy
import sys

from fastddpm import __version__

COMMANDS = {
    "train": "train a model; without options, on digits, on this machine",
    "classifier": "train a classifier of noisy images that guides a model's chain",
    "sample": "draw images from a trained model",
    "evaluate": "measure FID and other scores and bits/dim, draw the paper's pictures",
    "average": "make an average of a run's weights of any length, after the run",
    "inpaint": "draw the masked part of images (RePaint)",
    "compress": "compress images with a trained model, without loss or lossy, and decompress them",
    "ablation": "train and compare the paper's parameterizations and losses, at small scale",
    "page": "write a page about a run, to look at in a browser",
    "curves": "plot the logs of one or more runs",
    "data": "inspect a data set, verify it, or pack it into one file",
    "convert": "convert another implementation's checkpoint: diffusers, TensorFlow, OpenAI's and others",
    "export": "write a model for other runtimes: ONNX, torch.export, AOTInductor, diffusers",
    "pretrained": "pack the model of a run into one file",
    "doctor": "show which implementations run here, how exact and how fast they are",
}
USAGE = "\n".join(
    ["usage: python -m fastddpm.COMMAND [OPTIONS], or fastddpm COMMAND [OPTIONS]; --help lists the options", ""]
    + [f"  {name:12}{purpose}" for name, purpose in COMMANDS.items()]
)


def main() -> None:
    """Run the command named on the command line and exit as it does. An unknown name exits with 2."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"fastddpm.{name}"]
        runpy.run_module(f"fastddpm.{name}", run_name="__main__", alter_sys=True)
    elif name == "--version":
        print(f"fastddpm {__version__}")
    elif name in ("--help", "-h"):
        print(USAGE)
    else:
        print(f"error: there is no command {name!r}\n{USAGE}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
