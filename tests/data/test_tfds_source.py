import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_sets import (
    assert_holds,
    features_json,
    image_feature,
    info_json,
    label_feature,
    make_arrays,
    mask_feature,
    png,
    text_feature,
    write_images,
    write_records,
)

from ntt_sparse.data import images, tfds_source


def refused(name, data_dir, message, kind=ValueError):
    with pytest.raises(kind, match=message) as raised:
        tfds_source.read(name, data_dir)
    assert "\n" not in str(raised.value)


# --- reading ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_labels_and_order(data_dir, channels):
    # More than one decoding chunk, and images that are not square.
    arrays = make_arrays((5, 7, channels), train=1100)
    write_images(data_dir, "made", arrays)
    result = tfds_source.read("made", data_dir)
    assert_holds(result, arrays)
    assert result.x_train.dtype == np.uint8 and result.num_classes == 4


def test_shards_are_read_in_order(data_dir):
    arrays = make_arrays()
    write_images(data_dir, "made", arrays, lengths={"train": [7, 20, 13], "test": [11, 1]})
    assert_holds(tfds_source.read("made", data_dir), arrays)


def test_other_splits_are_left_alone(data_dir):
    arrays = make_arrays()
    write_images(data_dir, "svhn_cropped", arrays | {"extra": arrays["test"]})
    assert_holds(tfds_source.read("svhn_cropped", data_dir), arrays)


def test_load_standardises_what_was_read(data_dir):
    arrays = make_arrays()
    write_images(data_dir, "made", arrays, num_classes=6)
    data = images.load("made", data_dir=data_dir, validation_fraction=0.25)
    x, y = arrays["train"]
    assert data.name == "made" and data.num_classes == 6
    assert len(data.train.x) == 30 and len(data.validation.x) == 10
    np.testing.assert_array_equal(data.validation.y, y[images.split_indices(40, 0.25)[1]])
    x_test = data.test.x * data.std + data.mean
    np.testing.assert_allclose(x_test, arrays["test"][0], atol=1e-3)
    np.testing.assert_allclose(data.mean, x.mean((0, 1, 2)), rtol=1e-12)


def test_fine_labels_of_cifar100(data_dir):
    arrays = make_arrays()
    splits = {
        split: [
            {"coarse_label": int(label) // 2, "image": png(image), "label": int(label)}
            for image, label in zip(x, y, strict=True)
        ]
        for split, (x, y) in arrays.items()
    }
    features = {
        "coarse_label": label_feature(2),
        "image": image_feature((5, 7, 3)),
        "label": label_feature(4),
    }
    write_records(data_dir, "cifar100", splits, features)
    result = tfds_source.read("cifar100", data_dir)
    assert_holds(result, arrays)
    assert result.num_classes == 4


def test_keys_are_found_by_their_features(data_dir):
    # A segmentation mask is stored like an image, and is not the one meant.
    arrays = make_arrays()
    mask = np.zeros((5, 7, 1), np.uint8)
    splits = {
        split: [
            {"digit": int(b), "mask": png(mask), "scan": png(a)} for a, b in zip(x, y, strict=True)
        ]
        for split, (x, y) in arrays.items()
    }
    features = {
        "digit": label_feature(4),
        "mask": mask_feature((5, 7, 1)),
        "scan": image_feature((5, 7, 3)),
    }
    write_records(data_dir, "made", splits, features)
    assert_holds(tfds_source.read("made", data_dir), arrays)


def test_unlabelled_examples_are_reported_by_load(data_dir):
    arrays = make_arrays()
    arrays["test"][1][3] = -1
    write_images(data_dir, "made", arrays)
    with pytest.raises(ValueError, match="test label -1 of example 3"):
        images.load("made", data_dir=data_dir)


# --- finding ----------------------------------------------------------------------------


def test_newest_complete_version(data_dir):
    arrays = {version: make_arrays(seed=i) for i, version in enumerate(["3.0.9", "3.0.10"])}
    for version, content in arrays.items():
        write_images(data_dir, "made", content, version=version)
    for leftover in ("4.0.0", "9.0.0.incompleteABCD", "downloads"):
        (data_dir / "made" / leftover).mkdir()
    assert tfds_source.find("made", data_dir).name == "3.0.10"
    assert_holds(tfds_source.read("made", data_dir), arrays["3.0.10"])


def test_configs(data_dir):
    arrays = {config: make_arrays(seed=i) for i, config in enumerate(["letters", "digits"])}
    write_images(data_dir, "emnist", arrays["letters"], config="letters")
    assert_holds(tfds_source.read("emnist", data_dir), arrays["letters"])
    write_images(data_dir, "emnist", arrays["digits"], config="digits")
    assert_holds(tfds_source.read("emnist/digits", data_dir), arrays["digits"])
    assert_holds(tfds_source.read("emnist/letters", data_dir), arrays["letters"])
    refused("emnist", data_dir, "configs digits, letters: name one, such as 'emnist/digits'")
    refused("emnist/letter", data_dir, "'emnist/letter' is not prepared", FileNotFoundError)


def test_data_dir_from_argument_environment_and_home(tmp_path, monkeypatch):
    homes = {}
    for i, place in enumerate(("argument", "environment", "home/tensorflow_datasets")):
        homes[place] = make_arrays(seed=i)
        write_images(tmp_path / place, "made", homes[place])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert_holds(tfds_source.read("made"), homes["home/tensorflow_datasets"])
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    assert_holds(tfds_source.read("made"), homes["environment"])
    assert_holds(tfds_source.read("made", tmp_path / "argument"), homes["argument"])


def test_unprepared_set_names_the_command(data_dir):
    write_images(data_dir, "made", make_arrays())
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as raised:
        images.load("fashion_mnist", data_dir=data_dir)
    assert time.perf_counter() - start < 5
    assert str(raised.value) == (
        f"'fashion_mnist' is not prepared: data_dir {data_dir} holds made. To prepare it: "
        'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('fashion_mnist', file_format='array_record', data_dir='{data_dir}')"
        '.download_and_prepare()"'
    )


def test_missing_and_empty_data_dir(data_dir):
    refused("mnist", data_dir, f"{data_dir} holds no prepared set", FileNotFoundError)
    refused("mnist", data_dir / "no", f"{data_dir}/no is no folder", FileNotFoundError)


@pytest.mark.parametrize(
    "name, close",
    [("mnits", "'mnist'"), ("svhn", "'svhn_cropped'"), ("digit", "'digits'"), ("Made", "'made'")],
)
def test_misspelt_names(data_dir, name, close):
    write_images(data_dir, "made", make_arrays())
    refused(name, data_dir, f"Did you mean {close}", FileNotFoundError)


@pytest.mark.parametrize("name", ["", "../made", "/etc/made", "a b", "made.npy", "made/", "a/b/c"])
def test_names_that_are_no_names(data_dir, name):
    refused(name, data_dir, "is no data set: expected 'digits', a path that ends in .npz")


# --- damage -----------------------------------------------------------------------------


def cut_shard(folder):
    shard = next(folder.glob("*-train.array_record-*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def drop_shard(folder):
    next(folder.glob("*-test.array_record-*")).unlink()


def overstate_count(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["41"]
    (folder / "dataset_info.json").write_text(json.dumps(info))


def drop_test_split(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    del info["splits"][1]
    (folder / "dataset_info.json").write_text(json.dumps(info))


def say_tfrecord(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))


def features(**content):
    return lambda folder: (folder / "features.json").write_text(json.dumps(features_json(content)))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_shard, "split train in .*made/1.0.0 cannot be read"),
        (drop_shard, "split test in .*made/1.0.0 cannot be read"),
        (overstate_count, "split train in .* cannot be read"),
        (
            drop_test_split,
            r"made/1.0.0 cannot be read: it holds splits \['train'\], expected train and test",
        ),
        (lambda f: (f / "dataset_info.json").write_text("{"), "dataset_info.json is damaged"),
        (lambda f: (f / "dataset_info.json").write_text("[]"), "dataset_info.json is damaged"),
        (lambda f: (f / "features.json").write_text("{"), "made/1.0.0 cannot be read"),
        (lambda f: (f / "features.json").unlink(), "made/1.0.0 cannot be read"),
        (features(image=image_feature((5, 7, 3))), "found 0 features of type ClassLabel"),
        (features(label=label_feature(4), id=text_feature()), "found 0 features of type Image"),
        (
            features(
                label=label_feature(4), a=image_feature((5, 7, 3)), b=image_feature((1, 1, 3))
            ),
            "found 2 features of type Image among",
        ),
        (
            features(label=label_feature(4), image=image_feature((-1, -1, 3))),
            "expected one 8-bit shape",
        ),
        (
            # As many pixels, in another arrangement.
            features(label=label_feature(4), image=image_feature((7, 5, 3))),
            r"split train in .* cannot be read: image 0: it is \(5, 7\), expected \(7, 5\)",
        ),
    ],
)
def test_damaged_folders(data_dir, cache_dir, damage, message):
    damage(write_images(data_dir, "made", make_arrays()))
    refused("made", data_dir, message)
    assert not cache_dir.exists()


def test_damaged_image(data_dir):
    arrays = make_arrays()
    splits = {
        split: [{"image": png(a), "label": int(b)} for a, b in zip(x, y, strict=True)]
        for split, (x, y) in arrays.items()
    }
    splits["test"][5]["image"] = splits["test"][5]["image"][:-30]
    declared = {"image": image_feature((5, 7, 3)), "label": label_feature(4)}
    write_records(data_dir, "made", splits, declared)
    refused("made", data_dir, "split test in .* cannot be read: image 5")


# --- TensorFlow -------------------------------------------------------------------------


def test_reading_needs_no_tensorflow_and_no_network(data_dir, cache_dir):
    write_images(data_dir, "made", make_arrays())
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from ntt_sparse.data import images\n"
        f"images.load('made', data_dir={str(data_dir)!r})\n"
        "try: images.load('mnist', data_dir='/nowhere')\n"
        "except FileNotFoundError: pass\n"
        "print(*sorted({'tensorflow', 'matplotlib', 'sklearn', 'jax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")
    # It was decoded there, not found in a cache.
    assert len(list(cache_dir.iterdir())) == 1


@pytest.mark.parametrize("stated", [True, False])
def test_tfrecord_without_tensorflow(data_dir, monkeypatch, stated):
    folder = write_images(data_dir, "made", make_arrays())
    say_tfrecord(folder)
    if not stated:
        info = json.loads((folder / "dataset_info.json").read_text())
        del info["fileFormat"]
        (folder / "dataset_info.json").write_text(json.dumps(info))
    # How an absent module looks to importlib.
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    refused("made", data_dir, "is prepared as tfrecord, which only TensorFlow reads: pip install")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed"
)
def test_tfrecord_with_tensorflow(data_dir):
    arrays = make_arrays(train=60)
    lengths = {"train": [20, 25, 15], "test": [12]}
    folder = data_dir / "made" / "1.0.0"
    folder.mkdir(parents=True)
    declared = {"image": image_feature((5, 7, 3)), "label": label_feature(4)}
    (folder / "features.json").write_text(json.dumps(features_json(declared)))
    info = info_json("made", "1.0.0", "tfrecord", lengths)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    stored = {f"{a}_{s}": v for s, p in arrays.items() for a, v in zip("xy", p, strict=True)}
    np.savez(data_dir / "made.npz", **stored)
    code = (
        "import numpy as np\n"
        "import tensorflow as tf\n"
        "from made_sets import example, png\n"
        f"root, lengths = {str(data_dir)!r}, {lengths!r}\n"
        "made = np.load(root + '/made.npz')\n"
        "for split, counts in lengths.items():\n"
        "    examples = zip(made['x_' + split], made['y_' + split])\n"
        "    for i, count in enumerate(counts):\n"
        "        name = f'made-{split}.tfrecord-{i:05}-of-{len(counts):05}'\n"
        "        with tf.io.TFRecordWriter(f'{root}/made/1.0.0/{name}') as writer:\n"
        "            for _ in range(count):\n"
        "                x, y = next(examples)\n"
        "                writer.write(example({'image': png(x), 'label': int(y)}))\n"
        "from ntt_sparse.data import tfds_source\n"
        "result = tfds_source.read('made', root)\n"
        "for key in made.files:\n"
        "    np.testing.assert_array_equal(getattr(result, key), made[key])\n"
        "print(result.num_classes)"
    )
    # In its own process: TensorFlow weighs on every test that follows.
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.getcwd()}"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.stdout.strip() == "4", result.stderr
