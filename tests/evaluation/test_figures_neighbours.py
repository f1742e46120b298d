"""Nearest neighbours against every distance computed one by one in whole numbers."""

from typing import Any

import numpy as np
import pytest

from fastddpm.errors import UsageError
from fastddpm.evaluation.figures import neighbours
from fastddpm.evaluation.figures.neighbours import nearest_features, nearest_pixels


def random_images(num: int, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 3, side, side), dtype=np.uint8)


def brute_force(queries: np.ndarray, images: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, and exact squared distances as Python's whole numbers; the smaller index first among equals."""
    indices, squares = [], []
    for query in queries:
        pairs = [zip(query.ravel().tolist(), image.ravel().tolist(), strict=True) for image in images]
        all_of_them = [sum((a - b) ** 2 for a, b in pair) for pair in pairs]
        order = sorted(range(len(images)), key=lambda i: (all_of_them[i], i))[:k]
        indices.append(order)
        squares.append([all_of_them[i] for i in order])
    return np.array(indices), np.array(squares)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_pixels_exactly_in_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies, so that there are ties and a distance of 0, whatever the size of a block."""
    images = random_images(50)
    images[[31, 8]] = images[20]
    queries = np.concatenate([images[[20, 3]], random_images(3, seed=1)])
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", rows * 8 * 108)
    found = nearest_pixels(queries, images, 6)
    indices, squares = brute_force(queries, images, 6)
    assert np.array_equal(found.indices, indices) and found.indices[0, :3].tolist() == [8, 20, 31]
    assert np.array_equal(np.rint(found.distances**2).astype(int), squares)
    assert np.array_equal(found.distances, np.sqrt(squares.astype(float)))


def test_one_level_in_one_pixel_of_a_large_image_counts() -> None:
    """The squares of 3 x 256 x 256 levels add up to 10^10: float32 would not see 1 in it."""
    image = np.full((1, 3, 256, 256), 255, np.uint8)
    image[0, 0, 0, 0] = 254
    near, far = image.copy(), image.copy()
    near[0, 1, 5, 5], far[0, 1, 5, 4:6] = 254, 254
    found = nearest_pixels(image, np.concatenate([far, near, image]), 3)
    assert found.indices.tolist() == [[2, 1, 0]] and found.distances.tolist() == [[0.0, 1.0, np.sqrt(2.0)]]


@pytest.mark.parametrize("crop", [1, 3, 6])
def test_crop(crop: int) -> None:
    images, queries = random_images(20), random_images(2, seed=1)
    top = (6 - crop) // 2
    inside = np.s_[:, :, top : top + crop, top : top + crop]
    found = nearest_pixels(queries, images, 4, crop=crop)
    assert np.array_equal(found.indices, brute_force(queries[inside], images[inside], 4)[0])


def seen(images: np.ndarray) -> np.ndarray:
    """Features of another scale and with a large offset, over which |a|^2 + |b|^2 - 2ab would lose digits."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    return np.stack([1e3 + flat.mean(1), flat.std(1), flat[:, ::7].sum(1)], axis=1)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_features(batch: int) -> None:
    images, batches = random_images(30), []
    images[17] = images[4]
    queries = np.concatenate([images[[4]], random_images(3, seed=1)])

    def features(chosen: np.ndarray) -> np.ndarray:
        batches.append(len(chosen))
        return seen(chosen)

    found = nearest_features(queries, images, 5, features, batch=batch)
    difference = seen(queries).astype(np.float64)[:, None] - seen(images).astype(np.float64)
    distances = np.sqrt((difference**2).sum(-1))
    order = np.argsort(distances, axis=1, kind="stable")[:, :5]
    assert np.array_equal(found.indices, order) and max(batches) <= batch
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, order, 1), rtol=1e-12)
    assert found.distances[0, :2].tolist() == [0, 0] and found.indices[0, :2].tolist() == [4, 17]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"neighbours must be in 1\.\.20, the number of images; got 0"),
        ({"k": 21}, r"neighbours must be in 1\.\.20, the number of images; got 21"),
        ({"crop": 7}, r"crop must be in 1\.\.6, the images' side; got 7"),
        ({"crop": 0}, r"crop must be in 1\.\.6, the images' side; got 0"),
        ({"queries": random_images(2, side=5)}, r"got uint8 \(2, 3, 5, 5\) and uint8 \(20, 3, 6, 6\)"),
        ({"queries": random_images(2).astype(float)}, "got float64"),
        ({"images": random_images(20).astype(np.int64)}, "and int64"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    given = {"queries": random_images(2, seed=1), "images": random_images(20), "k": 3} | change
    with pytest.raises(UsageError, match=message):
        nearest_pixels(**given)
