"""PyTorch files read without PyTorch: real ones, and ones made to do harm."""

import pickle
import zipfile

import numpy as np
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.weights import torch_archive, torch_code
from tests.weights.files import (
  STATE_DICT,
  STORAGES,
  TORCHSCRIPT,
  dictionary,
  number,
  numbers,
  tensor,
  text,
  write,
  write_state,
)  # fmt: skip


def refused(path, match):
  with pytest.raises(InputError, match=match) as error:
    torch_archive.read(path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_state_dict_of_pytorch():
  kind, state, _ = torch_archive.read(STATE_DICT)
  assert kind == torch_archive.STATE_DICT and len(state) == 74
  assert state["visual.conv1.weight"].shape == (128, 3, 8, 8)


def test_torchscript_of_pytorch():
  kind, state, _ = torch_archive.read(TORCHSCRIPT)
  assert kind == torch_archive.TORCHSCRIPT
  assert state["context_length"] == 16 and state["context_length"].dtype == np.int64
  assert state["visual.conv1.weight"].dtype == np.float16
  assert state["ln_final.weight"].dtype == np.float32


@pytest.mark.parametrize("dtype", STORAGES)
def test_values_types_and_strides(tmp_path, dtype):
  array = MATRIX.astype(dtype)
  root = dictionary(
    {
      "whole": tensor("0", array),
      "transposed": tensor("0", array, shape=(3, 2), strides=(1, 3)),
      "row": tensor("0", array, offset=3, shape=(3,), strides=(1,)),
      "scalar": tensor("0", array, offset=2, shape=(), strides=()),
      "empty": tensor("0", array, shape=(0, 3)),
    }
  )
  _, state, _ = torch_archive.read(write(tmp_path / "x.pt", root, {"0": array}))
  assert all(value.dtype == array.dtype for value in state.values())
  np.testing.assert_array_equal(state["whole"], array)
  np.testing.assert_array_equal(state["transposed"], array.T)
  np.testing.assert_array_equal(state["row"], array[1])
  assert state["scalar"] == 2 and state["empty"].shape == (0, 3)


def test_state_dict_in_a_checkpoint(tmp_path):
  def wrap(root):
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor("0", MATRIX) + b"\x88"
    parameter += b"ccollections\nOrderedDict\n)RtR"
    ordered = b"ccollections\nOrderedDict\n)R(" + text("w") + parameter + b"u"
    notes = b"}" + text("_metadata") + b"}sb"
    return dictionary({"meta": dictionary({"epoch": number(3)}), "state_dict": ordered + notes})

  path = write_state(tmp_path / "x.pth", {"w": MATRIX}, wrap)
  np.testing.assert_array_equal(torch_archive.read(path)[1]["w"], MATRIX)


def test_the_state_of_an_optimizer_is_not_read(tmp_path):
  """A flipped bit in its storage is no matter, one in the weights is."""
  moments = dictionary({"exp_avg": tensor("9", np.full(5, 7, np.float32))})

  def wrap(root):
    return dictionary({"optimizer": dictionary({"state": moments}), "state_dict": root})

  path = tmp_path / "x.pt"
  write_state(path, {"w": MATRIX}, wrap)
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("model/data/9", np.full(5, 7, np.float32).tobytes())
  good = path.read_bytes()
  for old, new in ((np.float32(7), np.float32(8)), (np.float32(4), np.float32(9))):
    path.write_bytes(good.replace(old.tobytes(), new.tobytes()))
    if old == 7:
      np.testing.assert_array_equal(torch_archive.read(path).tensors["w"], MATRIX)
    else:
      refused(path, "Bad CRC-32")


def test_what_a_training_notes_beside_the_weights_is_passed_over(tmp_path):
  """Arguments, paths, types and devices, as `torch.save` writes them."""
  notes = {
    "args": b"cargparse\nNamespace\n)\x81}" + text("lr") + b"K\x01sb",
    "out": b"cpathlib\nPosixPath\n(" + text("/") + text("runs") + b"tR",
    "dtype": b"ctorch\nfloat16\n",
    "device": b"ctorch\ndevice\n" + text("cpu") + b"\x85R",
    "size": b"ctorch\nSize\n(K\x01K\x02t\x85R",
    "losses": b"ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R" + text("a") + b"]s",
    "seen": b"c__builtin__\nset\n]\x85R",
  }
  path = write_state(
    tmp_path / "x.pt", {"w": MATRIX}, lambda root: dictionary({**notes, "model": root})
  )
  np.testing.assert_array_equal(torch_archive.read(path).tensors["w"], MATRIX)


@pytest.mark.parametrize(
  ("root", "match"),
  [
    (b"cclip.model\nCLIP\n)\x81", "clip.model.CLIP: if you trust .* save its state_dict"),
    (dictionary({"q": dictionary({"w": number(1)})}), "'q' .* not a tensor: use a file with the"),
    (tensor("0", MATRIX), "not a state dict: use a file with the state dict of a whole model"),
  ],
)
def test_what_to_do_about_other_files_of_pytorch(tmp_path, root, match):
  """A whole model, MaskCLIP's projections, and its text embeddings."""
  refused(write(tmp_path / "x.pt", root, {"0": MATRIX}), match)


def test_what_is_written_is_read(tmp_path):
  state = {"a.w": MATRIX.T, "scalar": np.float32(3), "empty": np.zeros((0, 2), np.float32)}
  torch_archive.write(tmp_path / "x.pth", state, {"note": "é"})
  kind, again, _ = torch_archive.read(tmp_path / "x.pth")
  assert kind == torch_archive.STATE_DICT and list(again) == list(state)
  for name, value in state.items():
    np.testing.assert_array_equal(again[name], value)
    assert again[name].shape == np.shape(value)
  assert torch_code.read(tmp_path / "x.pth") == torch_code.Code()


@pytest.mark.parametrize("wrapper", ["build_intlist", "restore_type_tag"])
def test_torchscript_attributes_that_are_no_tensors(tmp_path, wrapper):
  sizes = b"ctorch.jit._pickle\n" + wrapper.encode() + b"\n(](K\x01K\x02etR"
  attributes = {"training": b"\x89", "hook": b"N", "sizes": sizes, "w": tensor("0", MATRIX)}
  inner = b"c__torch__.a.___torch_mangle_1\nB\n)\x81" + dictionary(attributes) + b"b"
  outer = b"c__torch__.a\nA\n)\x81" + dictionary({"inner": inner}) + b"b"
  kind, state, rest = torch_archive.read(write(tmp_path / "x.pt", outer, {"0": MATRIX}))
  assert kind == torch_archive.TORCHSCRIPT and list(state) == ["inner.w"]
  assert rest == {"inner.training": False, "inner.hook": None, "inner.sizes": [1, 2]}


def attack(tmp_path, name):
  """Pickles that create a file when an ordinary unpickler reads them, and their marker."""
  marker = tmp_path / "executed"
  call = text(f"touch {marker}") + b"\x85"
  roots = {
    "reduce": (b"\x80\x02", b"cposix\nsystem\n" + call + b"R"),
    "in a tensor's place": (b"\x80\x02", b"}" + text("w") + b"cposix\nsystem\n" + call + b"Rs"),
    "stack global": (
      b"\x80\x04",
      b"".join(b"\x8c" + bytes([len(x)]) + x for x in (b"posix", b"system"))
      + b"\x93"
      + call
      + b"R",
    ),
    "inst": (b"\x80\x02", b"(" + text(f"touch {marker}") + b"iposix\nsystem\n"),
    "obj": (b"\x80\x02", b"(cposix\nsystem\n" + text(f"touch {marker}") + b"o"),
    "eval": (
      b"\x80\x02",
      b"cbuiltins\neval\n" + text(f"open({str(marker)!r}, 'w').close()") + b"\x85R",
    ),
  }
  return *roots[name], marker


@pytest.mark.parametrize(
  "name", ["reduce", "in a tensor's place", "stack global", "inst", "obj", "eval"]
)
def test_code_is_refused_and_not_run(tmp_path, name):
  protocol, root, marker = attack(tmp_path, name)
  pickle.loads(protocol + root + b".")
  assert marker.exists(), "the attack itself does not work"
  marker.unlink()
  refused(write(tmp_path / "x.pt", root, protocol=protocol), "refused")
  assert not marker.exists()


@pytest.mark.parametrize(
  ("root", "match"),
  [
    # Attributes of an allowed function, construction of an allowed class by another road.
    (b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + text("y") + b"sb", "not a module"),
    (b"ctorch\nFloatStorage\n)\x81", "not a tensor"),
    (b"c__torch__\nA\n)R", "does not make a tensor"),
    (b"ctorch.hub\nload\n", "torch.hub.load"),
    (b"c__torch__evil\nA\n", "__torch__evil"),
    (text("x") + b"Q", "not a tensor storage"),
    (b"]", "list"),
    (dictionary({"w": number(3)}), "'w'"),
    (b"}" + number(1) + text("x") + b"s", "'1'"),
    (b"R", "malformed"),
    (b"", "malformed"),
    (pickle.LONG_BINGET + b"\xff\xff\xff\xff", "malformed"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n(" + numbers([]) + b"tR", "malformed"),
    # A module that contains itself.
    (b"c__torch__\nA\n)\x81q\x00}" + text("a") + b"h\x00sb", "nested"),
  ],
)
def test_pickle_of_something_else(tmp_path, root, match):
  refused(write(tmp_path / "x.pt", root), match)


@pytest.mark.parametrize(
  ("lie", "match"),
  [
    ({"count": 1 << 40}, "declared as"),
    ({"count": -1}, "malformed storage"),
    ({"shape": (1 << 40, 3)}, "does not fit"),
    ({"shape": (1 << 40,), "strides": (0,)}, "does not fit"),
    ({"shape": (2, 3), "strides": (4, 1)}, "does not fit"),
    ({"shape": (-2, 3)}, "malformed tensor"),
    ({"offset": 1}, "does not fit"),
    ({"offset": -1}, "malformed tensor"),
    ({"strides": (1,)}, "malformed tensor"),
    ({"strides": (-3, 1)}, "malformed tensor"),
  ],
)
def test_sizes_that_lie(tmp_path, lie, match):
  root = dictionary({"w": tensor("0", MATRIX, **lie)})
  refused(write(tmp_path / "x.pt", root, {"0": MATRIX}), match)


def test_archives_that_lie(tmp_path, monkeypatch):
  root = dictionary({"w": tensor("0", MATRIX)})
  refused(write(tmp_path / "x.pt", root), "storage '0' is missing")
  refused(write(tmp_path / "x.pt", root, {"0": MATRIX}, zipfile.ZIP_DEFLATED), "compressed")
  with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
    archive.writestr("something", "else")
  refused(tmp_path / "y.pt", "no data.pkl")
  with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
    archive.writestr("m/data.pkl", b"\x80\x02}.")
    archive.writestr("m/byteorder", "big")
  refused(tmp_path / "y.pt", "little-endian")
  monkeypatch.setattr(torch_archive, "_MAX_PICKLE_BYTES", 10)
  refused(write(tmp_path / "x.pt", root, {"0": MATRIX}), "larger than")


def test_damaged_files(tmp_path):
  content = TORCHSCRIPT.read_bytes()
  path = tmp_path / "x.pt"
  path.write_bytes(content[:-2000])
  refused(path, "damaged")
  flipped = bytearray(content)
  flipped[300_000] ^= 1
  path.write_bytes(flipped)
  refused(path, "damaged")
  path.write_bytes(b"\xff\xd8\xff\xe0 no archive")
  refused(path, "zip archive")
  refused(tmp_path / "missing.pt", "does not exist")
  refused(tmp_path, "is a folder")
