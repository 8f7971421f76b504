"""Honest files, small and made without a network."""

import json
import pickle
import zipfile
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from PIL import Image
from safetensors.numpy import save

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.arange(4, dtype=np.float16),
    "steps": np.array(7, np.int64),
    "mask": np.array([True, False, True, True]),
    "bytes": np.arange(8, dtype=np.uint8),
}
STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage", "b1": "BoolStorage"}


def safetensors():
    return save(ARRAYS, {"format": "pt", "note": "a text"})


class Named:
    """Pickles as the name of an object of torch."""

    def __init__(self, module, name):
        self.module, self.__qualname__ = module, name


class Storage:
    """Pickles as a reference to a storage."""

    def __init__(self, array, key):
        kind = STORAGES.get(array.dtype.str[1:], "ByteStorage")
        self.fields = ("storage", Named("torch", kind), str(key), "cpu", array.size)


class Tensor:
    """Pickles as torch's tensor over a storage."""

    def __init__(self, array, key, **fields):
        """fields: in place of those of the array."""
        strides = tuple(stride // array.itemsize for stride in array.strides)
        honest = {"storage": Storage(array, key), "offset": 0, "shape": array.shape}
        honest |= {"strides": strides, "requires_grad": False, "hooks": {}}
        self.fields = tuple((honest | fields).values())


class _Pickler(pickle._Pickler):
    """Writes what torch.save writes, without torch."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.__qualname__}\n".encode())
        elif isinstance(obj, Storage):
            super().save(obj.fields)
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Tensor):
            self.save(Named("torch._utils", "_rebuild_tensor_v2"))
            super().save(obj.fields)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dump(value):
    """Return the pickle of a value, which may contain Tensor and Named."""
    out = BytesIO()
    _Pickler(out, 2).dump(value)
    return out.getvalue()


def state_dict():
    return {name: Tensor(array, i) for i, (name, array) in enumerate(ARRAYS.items())}


def pth(content=None, compression=zipfile.ZIP_STORED, byteorder=b"little", **more):
    """Return the file of a pickle, by default of a state dict.

    more: further entries of the zip file.
    """
    if content is None:
        content = dump({"epoch": 3, "state_dict": state_dict()})
    entries = {"data.pkl": content, "byteorder": byteorder}
    entries |= {f"data/{i}": array.tobytes() for i, array in enumerate(ARRAYS.values())}
    out = BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in (entries | {"version": b"3\n"} | more).items():
            archive.writestr(f"a/{name}", data)
    return out.getvalue()


def npy():
    out = BytesIO()
    np.save(out, np.linspace(0, 1, 4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8))
    return out.getvalue()


def manifest():
    request = {
        "prompts": ["a red circle", "a blue square"],
        "seed": 3,
        "num_frames": 8,
        "fps": 8.0,
        "sampling": {"sampler": "euler", "steps": 3, "guidance": 2.0},
        "controls": {"first_frame": "first.png"},
        "digests": {"first_frame": "0" * 64},
    }
    weights = {"workdir": "runs/a", "step": 6, "item": "ema", "identity": "1" * 64}
    value = {"request": request, "weights": weights, "pixels_sha256": "2" * 64, "versions": {}}
    return json.dumps(value, indent=2).encode()


def metadata():
    rows = [{"file_name": "a.mp4", "caption": text} for text in ("a red circle", "größer 円")]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n"


def caption():
    return "Ein größerer Kreis, 円 und \N{GRINNING FACE}, bewegt sich.\n".encode()


def pixels(height=16, width=24):
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def image(kind):
    out = BytesIO()
    picture = Image.fromarray(pixels())
    exif = picture.getexif()
    exif[0x0112] = 6  # turned
    picture.save(out, kind, exif=exif) if kind in ("JPEG", "PNG") else picture.save(out, kind)
    return out.getvalue()


def video(container, codec="libx264"):
    out = BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 8)
        for level in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * level, np.uint8), "rgb24")
            frame.pts = level
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()
