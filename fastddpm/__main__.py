"""python -m fastddpm, or fastddpm: which commands there are; with the name of one, that command."""

import runpy
import sys

from fastddpm import __version__

COMMANDS = {
    "train": "train a model; without options, on digits, on this machine",
    "sample": "draw images from a trained model",
    "evaluate": "FID and other scores, bits/dim, the paper's figures of samples",
    "inpaint": "fill in the masked part of images (RePaint)",
    "compress": "images to a file and back by a model, lossless or not",
    "ablation": "the paper's table of parameterizations and losses, at small scale",
    "curves": "the logs of runs as one plot",
    "data": "look at a data set, verify it, pack it into one file",
    "doctor": "what runs here, how exactly and how fast, and why nothing faster does",
}
USAGE = "\n".join(
    ["usage: python -m fastddpm.COMMAND, or fastddpm COMMAND; --help after it lists its options", ""]
    + [f"  {name:10}{purpose}" for name, purpose in COMMANDS.items()]
)


def main() -> None:
    """Exits as the command does; 2 for a name that is none."""
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
