"""Small image sets written by the tests: `.npz`, and TensorFlow Datasets' own format."""

import io
import json

import numpy as np
import pytest

from ntt_sparse.data import images

FEATURES = "tensorflow_datasets.core.features."


def image_feature(shape):
    return {
        "image": {"dtype": "uint8", "shape": {"dimensions": [str(d) for d in shape]}},
        "pythonClassName": FEATURES + "image_feature.Image",
    }


def mask_feature(shape):
    content = image_feature(shape)["image"] | {"label": {"numClasses": "2"}, "useColormap": True}
    return {"image": content, "pythonClassName": FEATURES + "labeled_image.LabeledImage"}


def label_feature(num_classes):
    return {
        "classLabel": {"numClasses": str(num_classes)},
        "pythonClassName": FEATURES + "class_label_feature.ClassLabel",
    }


def text_feature():
    return {"pythonClassName": FEATURES + "text_feature.Text", "text": {}}


def features_json(features):
    return {
        "featuresDict": {"features": features},
        "pythonClassName": FEATURES + "features_dict.FeaturesDict",
    }


def info_json(name, version, file_format, splits):
    return {
        "fileFormat": file_format,
        "moduleName": f"tensorflow_datasets.image_classification.{name}",
        "name": name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(n) for n in lengths],
            }
            for split, lengths in splits.items()
        ],
        "version": version,
    }


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def example(values):
    """A serialized `tf.train.Example` of bytes and integers."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def feature(value):
        if isinstance(value, bytes):
            return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))

    features = tf_feature_pb2.Features(feature={k: feature(v) for k, v in values.items()})
    return tf_example_pb2.Example(features=features).SerializeToString()


def write_shard(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_records(root, name, splits, features, *, version="1.0.0", config=None, lengths=None):
    """Writes `{split: [values of an example, ...]}` as one prepared version."""
    folder = root / name / config / version if config else root / name / version
    folder.mkdir(parents=True)
    lengths = lengths or {split: [len(examples)] for split, examples in splits.items()}
    for split, examples in splits.items():
        cuts = np.cumsum(lengths[split])[:-1]
        shards = np.split(np.arange(len(examples)), cuts)
        for i, shard in enumerate(shards):
            shard_name = f"{name}-{split}.array_record-{i:05}-of-{len(shards):05}"
            write_shard(folder / shard_name, [example(examples[j]) for j in shard])
    info = info_json(name, version, "array_record", lengths)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features_json(features)))
    return folder


def make_arrays(shape=(5, 7, 3), num_classes=4, train=40, test=12, seed=0):
    """Images and labels of a made set, `{split: (x, y)}`; every class occurs in training."""
    random = np.random.RandomState(seed)
    splits = {}
    for split, n in (("train", train), ("test", test)):
        labels = random.permutation(np.arange(n) % num_classes)
        splits[split] = random.randint(0, 256, (n, *shape)).astype(np.uint8), labels
    return splits


def write_images(root, name, arrays, *, num_classes=4, **options):
    """Writes `{split: (x, y)}` with the features of CIFAR-10."""
    shape = next(iter(arrays.values()))[0].shape[1:]
    splits = {
        split: [
            {"id": f"{split}_{i}".encode(), "image": png(image), "label": int(label)}
            for i, (image, label) in enumerate(zip(x, y, strict=True))
        ]
        for split, (x, y) in arrays.items()
    }
    features = {
        "id": text_feature(),
        "image": image_feature(shape),
        "label": label_feature(num_classes),
    }
    return write_records(root, name, splits, features, **options)


def save_npz(path, arrays, **extra):
    (x_train, y_train), (x_test, y_test) = arrays["train"], arrays["test"]
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, **extra)
    return path


def load_arrays(tmp_path, x=None, y=None, x_test=None, y_test=None, **options):
    """Loads a made set with some of its arrays replaced."""
    made = make_arrays()
    arrays = {
        "train": (made["train"][0] if x is None else x, made["train"][1] if y is None else y),
        "test": (
            made["test"][0] if x_test is None else x_test,
            made["test"][1] if y_test is None else y_test,
        ),
    }
    return images.load(save_npz(tmp_path / "made.npz", arrays), **options)


def refused(tmp_path, message, **changes):
    with pytest.raises(ValueError, match=message) as raised:
        load_arrays(tmp_path, **changes)
    assert "\n" not in str(raised.value)


def assert_holds(result, arrays):
    for split, (x, y) in arrays.items():
        np.testing.assert_array_equal(getattr(result, f"x_{split}"), x)
        np.testing.assert_array_equal(getattr(result, f"y_{split}"), y)
