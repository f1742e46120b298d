"""The seeds and the labels of a batch of images, checked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastddpm.errors import UsageError, problem
from fastddpm.runtime.checks import integer
from fastddpm.runtime.network import Interface, interface_of

if TYPE_CHECKING:
    from fastddpm.pretrained.model import Model

MAX_IMAGE = 2**32 - 1
_MAX_LABEL = 2**63 - 1  # of a tensor


def image_seeds(seeds: Sequence[int]) -> list[int]:
    """Return `seeds` as a list of image numbers, each a 32-bit word of the Philox counter.

    Raises `UsageError` for anything but one or more integers in 0..2^32-1.
    """
    if isinstance(seeds, int):
        raise UsageError(f"seeds must be a sequence, such as range({max(seeds, 1)}) or [{seeds}]; got {seeds}")
    values = [integer(seed, "an image's seed") for seed in seeds]
    if not values:
        raise UsageError("at least one seed is needed")
    wrong = [seed for seed in values if not 0 <= seed <= MAX_IMAGE]
    if wrong:
        raise UsageError(f"image seeds must be in 0..{MAX_IMAGE}; got {wrong[0]}")
    return values


def image_labels(
    labels: Sequence[int] | None, seeds: Sequence[int], network: Interface, *, classes: int, any_label: bool
) -> list[int] | None:
    """Return the class of each seed: `labels` if given, otherwise seed modulo `classes`; None without classes.

    `network`: tells its classes and null label. `classes`: of the network, or if it has none, of a classifier.
    `any_label`: whether labels may be given although the network has no classes. Raises `UsageError` for a wrong number
    of labels, and for one neither in range nor the null label.
    """
    if labels is None:
        return [seed % classes for seed in seeds] if classes else None
    if not network.num_classes and not any_label:
        raise UsageError("this network was trained without classes; leave labels out")
    if len(labels) != len(seeds):
        raise UsageError(f"one label for each seed: got {len(labels)} labels for {len(seeds)} seeds")
    values = [integer(label, "a label") for label in labels]
    if network.num_classes:
        wrong = [label for label in values if not 0 <= label < network.num_classes and label != network.null_label]
    else:
        wrong = [label for label in values if abs(label) > _MAX_LABEL]
    if wrong:
        last = network.num_classes - 1 if network.num_classes else _MAX_LABEL
        raise UsageError(f"labels must be in 0..{last}; got {wrong[0]}")
    return values


def seeds_and_labels_fit(
    seeds: Sequence[int], labels: Sequence[int] | None, model: "Model", *, any_label: bool
) -> None:
    """Raise `UsageError`, inside `all_problems` with what is wrong with both, unless `model` takes seeds and labels.

    `labels`: any number, which seeds they are of is the caller's. `any_label`: as for `image_labels`.
    """
    with problem():
        image_seeds(seeds)
    if labels is not None:
        with problem():
            image_labels(labels, labels, interface_of(model.unet), classes=0, any_label=any_label)
