"""Folders in the format of ImageNet: what is listed, decoded and cut out."""

import numpy as np
import pytest
from PIL import Image

from ntt_sparse.data import folders, images
from ntt_sparse.data.folders import FolderImages

CLASSES = ("n01440764", "n01443537", "n02102040")
SIZES = ((40, 30), (30, 40), (64, 64), (24, 90))


def picture(label, index, width, height):
    """A smooth picture of its own, of which the middle is known."""
    y, x = np.mgrid[:height, :width]
    pixels = [100 + 40 * label + 0 * x, 255 * x / width, 10 * index + 150 * y / height]
    return Image.fromarray(np.stack(pixels, -1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as they come: JPEG and PNG, upper case, gray, CMYK, with transparency."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                made = picture(label, index, *SIZES[index])
                made.save(place / f"{name}_{index}.JPEG", quality=95)
            if split == "train":
                made.convert("L").save(place / "x_gray.jpg")
                made.convert("CMYK").save(place / "x_print.jpeg")
                made.convert("RGBA").save(place / "x_clear.png")
                (place / "notes.txt").write_text("no image")
    return root


def test_what_is_listed(folder):
    data = images.load(folder, size=16, validation_fraction=0.0)
    assert isinstance(data.train.x, FolderImages)
    assert data.num_classes == 3 and data.input_shape == (16, 16, 3) and data.name == folder.name
    assert np.bincount(data.train.y).tolist() == [7, 7, 7]
    # Shuffled, so that the first images are of all classes.
    assert len(set(data.train.y[:7])) > 1 and len(set(data.test.y[:4])) > 1
    assert data.train.x.shape == (21, 16, 16, 3) and data.test.x.shape == (6, 16, 16, 3)
    for split in (data.train, data.test):
        for index, label in enumerate(split.y):
            assert CLASSES[label] in split.x.paths[split.x.indices[index]]
    assert np.bincount(data.test.y).tolist() == [2, 2, 2]
    held = images.load(folder, size=16, validation_fraction=0.3, seed=9)
    train, validation = images.split_indices(21, 0.3, 9)
    np.testing.assert_array_equal(held.validation.y, data.train.y[validation])
    np.testing.assert_array_equal(held.train.x.indices, data.train.x.indices[train])


def test_the_middle_against_pillow(folder):
    """The shorter side to 256 / 224 of the size, then the middle, as everybody evaluates."""
    found, labels = folders.read(folder, 56).train
    values = found[:]
    assert values.dtype == np.float32 and values.shape == (21, 56, 56, 3)
    for index, path in enumerate(found.paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = 64 / min(image.size)
        width, height = (round(scale * side) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), float)
        left, top = (width - 56) // 2, (height - 56) // 2
        middle = resized[top : top + 56, left : left + 56]
        pixels = values[index] * np.asarray(folders.STD) + np.asarray(folders.MEAN)
        assert np.max(np.abs(pixels - middle)) < 3.0, path
        assert labels[index] == CLASSES.index(path.split("/")[-2])
    np.testing.assert_array_equal(found[2:5], values[2:5])
    np.testing.assert_array_equal(found.select(np.array([7, 3]))[:], values[[7, 3]])
    assert found[:0].shape == (0, 56, 56, 3)


def test_random_parts(folder):
    """Within the image, of 8 to 100 % of its area, mirrored in half of all; by the draw alone."""
    found, _ = folders.read(folder, 32).train
    # The third is 64 x 64: red is constant, green grows with x, blue with y.
    parts = [found.random(2, np.random.RandomState(seed)) for seed in range(300)]
    np.testing.assert_array_equal(parts[7], found.random(2, np.random.RandomState(7)))
    assert all(part.shape == (32, 32, 3) and part.dtype == np.uint8 for part in parts)
    parts = np.asarray(parts, float)
    green = parts[:, :, -1, 1].mean(1) - parts[:, :, 0, 1].mean(1)
    mirrored = green < 0
    assert 0.4 < mirrored.mean() < 0.6
    blue = parts[:, -1, :, 2].mean(1) - parts[:, 0, :, 2].mean(1)
    assert np.all(blue > 0)
    # What part of the width and of the height is there: between first and last of 32 pixels.
    wide, high = np.abs(green) / 255 * 32 / 31, blue / 150 * 32 / 31
    area, aspect = wide * high, wide / high
    assert 0.05 < area.min() < 0.15 and 0.85 < area.max() < 1.05
    assert 0.65 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.5
    # Of a narrow image (24 x 90) no draw may fit: then the largest allowed part of its middle.
    narrow, _ = folders.read(folder, 8).train
    with Image.open(narrow.paths[3]) as image:
        middle = image.resize((8, 8), Image.Resampling.BILINEAR, box=(0, 29, 24, 61))
    allowed = [np.asarray(middle), np.asarray(middle)[:, ::-1]]
    draws = [narrow.random(3, np.random.RandomState(seed)) for seed in range(100)]
    found = [any(np.array_equal(draw, each) for each in allowed) for draw in draws]
    assert 3 < sum(found) < 50


def test_names_that_are_folders_by_chance(folder, tmp_path, monkeypatch):
    """A folder beside is no set, unless it has parts; what looks like a path is one."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mnist", "sets"):
        (tmp_path / name).mkdir()
    assert images.load("digits").input_shape == (8, 8, 1)
    with pytest.raises(FileNotFoundError, match="is not prepared"):
        images.load("mnist", data_dir=tmp_path / "sets", size=8)
    with pytest.raises(ValueError, match="train is not there"):
        images.load("./imagenet", size=8)
    (tmp_path / "set").symlink_to(folder)
    assert images.load("set", size=8).num_classes == 3


def test_bad_folders(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="images have to be in memory here"):
        images.load(folder)
    with pytest.raises(ValueError, match="size is 0, expected 1 or more"):
        images.load(folder, size=0)
    root = tmp_path / "set"
    root.mkdir()
    with pytest.raises(ValueError, match="train is not there"):
        folders.read(root)
    for split, names in (("train", ("a", "b")), ("val", ("a",))):
        (root / split).mkdir()
        if split == "val":
            with pytest.raises(ValueError, match="val holds no folders"):
                folders.read(root)
        for name in names:
            (root / split / name).mkdir()
    with pytest.raises(ValueError, match="have different classes, such as b"):
        folders.read(root)
    (root / "val" / "b").mkdir()
    with pytest.raises(ValueError, match=r"train/a holds no \.jpeg, \.jpg"):
        folders.read(root)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name / "broken.jpg").write_bytes(b"no image")
        (root / split / ".hidden").mkdir()
        (root / split / "a" / "._x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"broken\.jpg is no image that can be read"):
        folders.read(root).train[0][:]
    assert folders.read(root).classes == ("a", "b")
    assert len(folders.read(root).train[1]) == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install grain"):
        images.load(folder, size=8)
