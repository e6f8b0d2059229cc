"""Files of a folder are read back, by pycocotools, PyYAML and Pillow, and by ultralytics' rules."""

import base64
import concurrent.futures
import io
import json
import pathlib

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from rpn_jax.annotations import voc, yolo
from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.images import Labeled
from rpn_jax.annotations.options import ANNOTATIONS
from rpn_jax.base.errors import InputError
from tests import odd_pictures as odd
from tests.annotations import scenes
from tests.annotations.scenes import NAMES


@pytest.fixture
def photos(tmp_path):
  """Two images with files, one of them turned by EXIF, and one without."""
  folder = tmp_path / "my photos"
  (folder / "more").mkdir(parents=True)
  labels = [scenes.nested(), scenes.noise(23, 31, 0, len(NAMES)), scenes.noise(8, 9, 1)]
  files = [folder / "ü 1.png", folder / "more" / "turned.jpg", ""]
  images = [scenes.image(label) for label in labels]
  Image.fromarray(images[0]).save(files[0])
  exif = Image.Exif()
  exif[0x0112] = 6  # shown after a quarter turn to the right
  Image.fromarray(np.rot90(images[1])).save(files[1], exif=exif)
  return [Labeled(*each) for each in zip(images, labels, files)]


STEMS = ("ü 1", "turned", "array")


def collected(directory, photos, forms=ANNOTATIONS, **options):
  collection = Collection(directory, NAMES, forms, **options)
  written = [path for photo, stem in zip(photos, STEMS) for path in collection.add(photo, stem)]
  return written + collection.finish()


def read_coco(path, capsys):
  found = COCO(str(path))  # prints how long it took
  capsys.readouterr()
  return found


def labels_of(coco, image_id, shape):
  """The label map that the annotations of an image paint, the largest first."""
  label = np.full(shape, -1)
  for each in sorted(coco.imgToAnns[image_id], key=lambda each: -each["area"]):
    label[coco.annToMask(each).astype(bool)] = each["category_id"] - 1
  return label


def test_every_file_that_is_returned_is_there(tmp_path, photos):
  written = collected(tmp_path / "out", photos)
  assert sorted(written) == sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
  inside = {path.relative_to(tmp_path / "out").as_posix() for path in written}
  assert inside >= {
    "coco/annotations.json", "labelme/ü 1.json", "yolo/data.yaml", "yolo/labels/turned.txt",
    "yolo/images/turned.png", "yolo/images/array.png", "voc/class_names.txt",
    "voc/SegmentationClass/ü 1.png", "voc/JPEGImages/turned.png", "voc/sources/ü 1.json",
  }  # fmt: skip


@pytest.mark.parametrize("instances", ["regions", "classes"])
def test_coco_decodes_to_the_same_masks(tmp_path, photos, instances, capsys):
  (path,) = collected(tmp_path, photos, ["coco"], instances=instances)
  coco = read_coco(path, capsys)
  assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(NAMES)
  images = {image["file_name"]: image for image in coco.imgs.values()}
  assert list(images) == ["array.png", "more/turned.jpg", "ü 1.png"]
  for photo, name in zip(photos, ("ü 1.png", "more/turned.jpg", "array.png")):
    image = images[name]
    assert (image["height"], image["width"]) == photo.labels.shape
    np.testing.assert_array_equal(labels_of(coco, image["id"], photo.labels.shape), photo.labels)
    if instances == "classes":
      assert len(coco.imgToAnns[image["id"]]) == len(np.unique(photo.labels[photo.labels >= 0]))
  for each in coco.anns.values():
    runs = each["segmentation"]
    assert each["iscrowd"] == 0 and each["area"] == coco_mask.area(runs)
    assert each["bbox"] == coco_mask.toBbox(runs).tolist()
    # The very string of pycocotools' own encoder.
    again = coco_mask.encode(np.asfortranarray(coco_mask.decode(runs)))
    assert again["counts"].decode() == runs["counts"]


def test_polygons_of_coco(tmp_path, photos, capsys):
  (path,) = collected(tmp_path, photos, ["coco"], coco="polygons", simplify=0, instances="classes")
  coco = read_coco(path, capsys)
  for i, photo in zip((3, 2, 1), photos):
    np.testing.assert_array_equal(labels_of(coco, i, photo.labels.shape), photo.labels)
  for each in coco.anns.values():
    runs = coco.annToRLE(each)
    assert each["area"] == coco_mask.area(runs)
    np.testing.assert_allclose(each["bbox"], coco_mask.toBbox(runs))
    assert all(len(ring) >= 8 for ring in each["segmentation"])  # four numbers would be a box


def test_labelme_names_the_image_or_holds_it(tmp_path, photos):
  collected(tmp_path / "out", photos, ["labelme"], labelme="masks", instances="classes")
  for photo, stem in zip(photos, STEMS):
    path = tmp_path / "out" / "labelme" / f"{stem}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    label = np.full(photo.labels.shape, -1)
    for shape in content["shapes"]:
      (left, top), (right, bottom) = shape["points"]
      with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as file:
        mask = np.array(file)
      assert shape["group_id"] == NAMES.index(shape["label"])
      label[top : bottom + 1, left : right + 1][mask] = shape["group_id"]
    np.testing.assert_array_equal(label, photo.labels)
    assert (content["imageHeight"], content["imageWidth"]) == photo.size
    if photo.file:
      assert content["imageData"] is None and "\\" not in content["imagePath"]
      assert (path.parent / content["imagePath"]).samefile(photo.file)
    else:
      with Image.open(io.BytesIO(base64.b64decode(content["imageData"]))) as file:
        np.testing.assert_array_equal(np.array(file), photo.image)


def test_labelme_finds_the_image_from_below_a_link(tmp_path, photos):
  (tmp_path / "disk/deep/er").mkdir(parents=True)
  (tmp_path / "out").symlink_to("disk/deep/er")
  (tmp_path / "link").symlink_to("my photos/more")
  photo = Labeled(photos[1].image, photos[1].labels, tmp_path / "link/turned.jpg")
  collected(tmp_path / "out", [photo], ["labelme"])
  folder = tmp_path / "disk/deep/er/labelme"
  name = json.loads((folder / f"{STEMS[0]}.json").read_text(encoding="utf-8"))["imagePath"]
  assert (folder / name).samefile(photos[1].file)


def check_by_the_rules_of_ultralytics(path):
  """docs.ultralytics.com/datasets/segment, and what its loader asserts of each row.

  Returns:
    {name of an image: [(class index, ring in shares of the image)]}.
  """
  data = yaml.safe_load(path.read_text(encoding="utf-8"))
  assert "path" not in data  # then folders are sought beside the file
  assert [*data["names"]] == [*range(len(data["names"]))]
  found = {}
  for split in ("train", "val"):
    folder = path.parent / data[split]
    assert folder.name == "images"
    for image in folder.iterdir():
      labels = pathlib.Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
      found[image.name] = []
      for line in labels.read_text().splitlines():
        index, *numbers = line.split()
        assert int(index) < len(data["names"]) and len(numbers) >= 6 and not len(numbers) % 2
        assert all(0 <= float(number) <= 1 for number in numbers)
        found[image.name].append((int(index), np.array(numbers, float).reshape(-1, 2)))
  return data["names"], found


@pytest.mark.parametrize("simplify", [0, 1.0])
def test_yolo(tmp_path, photos, simplify):
  collected(tmp_path, photos, ["yolo"], simplify=simplify)
  names, found = check_by_the_rules_of_ultralytics(tmp_path / "yolo" / "data.yaml")
  assert tuple(names.values()) == NAMES  # also the one without pixels
  for photo, file in zip(photos, ("ü 1.png", "turned.png", "array.png")):
    height, width = photo.size
    label = np.full(photo.size, -1)
    for index, ring in found[file]:
      runs = coco_mask.frPyObjects([(ring * (width, height)).ravel().tolist()], height, width)
      label[coco_mask.decode(coco_mask.merge(runs)).astype(bool)] = index
    if not simplify:
      np.testing.assert_array_equal(label, photo.labels)
    with Image.open(tmp_path / "yolo" / "images" / file) as image:
      np.testing.assert_array_equal(np.array(image), photo.image)  # upright
    if file == "ü 1.png":
      copy = tmp_path / "yolo" / "images" / file
      assert copy.read_bytes() == pathlib.Path(photo.file).read_bytes()


def test_an_image_without_regions_has_an_empty_file(tmp_path, photos):
  nothing = Labeled(photos[0].image, np.full(photos[0].size, -1), photos[0].file)
  collected(tmp_path, [nothing])
  assert (tmp_path / "yolo/labels/ü 1.txt").read_text() == ""
  content = json.loads((tmp_path / "coco/annotations.json").read_text())
  assert content["annotations"] == [] and len(content["images"]) == 1
  with Image.open(tmp_path / "voc/SegmentationClass/ü 1.png") as image:
    assert np.unique(image).tolist() == [voc.VOID]


def test_voc_has_its_own_numbers_and_colors(tmp_path, photos):
  collected(tmp_path, photos, ["voc"])
  lines = (tmp_path / "voc/class_names.txt").read_text(encoding="utf-8").splitlines()
  assert lines == ["background", *NAMES[:4]]  # the class of that name is index 0
  for photo, stem in zip(photos, STEMS):
    with Image.open(tmp_path / "voc/SegmentationClass" / f"{stem}.png") as image:
      assert image.mode == "P"
      index, palette = np.array(image), np.array(image.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(index == 255, photo.labels < 0)
    named = [lines.index(name) for name in NAMES]
    np.testing.assert_array_equal(index[index < 255], np.take(named, photo.labels[index < 255]))
    # From VOC's development kit: aeroplane, cat, tv/monitor, void.
    assert palette[[1, 8, 20, 255]].tolist() == [
      [128, 0, 0], [64, 0, 0], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


def test_classes_that_voc_cannot_count(tmp_path):
  many = [f"class {i}" for i in range(255)]
  assert voc.indices(many[:254]).tolist() == [*range(1, 255)]
  assert voc.indices(["Background", *many[:254]]).tolist() == [*range(255)]
  with pytest.raises(InputError, match=r"at most 254 classes, .* 8 bits, got 255: save labels or"):
    Collection(tmp_path, many)
  names = [f"class {i}" for i in range(847)]
  label = np.arange(847).reshape(7, 121)
  collection = Collection(tmp_path, names, ["coco", "yolo"])
  collection.add(Labeled(scenes.image(label), label), "a")
  collection.finish()
  content = json.loads((tmp_path / "coco/annotations.json").read_text())
  assert sorted(each["category_id"] for each in content["annotations"]) == [*range(1, 848)]
  check_by_the_rules_of_ultralytics(tmp_path / "yolo/data.yaml")


@pytest.mark.parametrize("form", ["coco", "labelme", "yolo", "voc"])
def test_names_that_annotations_cannot_have(form, photos, tmp_path):
  photo = Labeled(photos[0].image, photos[0].labels, tmp_path / "\udcff.png")
  with pytest.raises(InputError, match=r"dcff.png: expected a file name in UTF-8"):
    Collection(tmp_path / "out", NAMES, [form]).add(photo, "a")
  assert not (tmp_path / "out").exists()


def test_a_name_of_several_lines_does_not_shift_the_others(tmp_path):
  for end in "\n\r\v\x85\u2028":
    with pytest.raises(InputError, match=r"save=voc: expected class names of one line, got 'a\\"):
      Collection(tmp_path, ["sky", f"a{end}b", "sea"], ["voc"])


def test_label_files_of_other_classes_are_not_mixed(tmp_path, photos):
  collected(tmp_path, photos)
  Collection(tmp_path, NAMES)  # again, or more images
  for form, file in (("yolo", "yolo/data.yaml"), ("voc", "voc/class_names.txt")):
    with pytest.raises(InputError, match=rf"{file}: expected the classes of this call, .*remove"):
      Collection(tmp_path, NAMES[:2], [form])
  Collection(tmp_path, NAMES[:2], ["coco", "labelme"])  # these name the classes in every file


def test_an_interrupted_call_leaves_the_old_file_or_none(tmp_path, photos, monkeypatch):
  path = tmp_path / "coco/annotations.json"
  collection = Collection(tmp_path, NAMES, ["coco"])
  assert collection.finish() == []
  collection.add(photos[0], "a")
  assert not path.exists()
  collection.finish()
  before = path.read_text()
  collection.add(photos[1], "b")
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "write_text", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      collection.finish()
  assert path.read_text() == before and [*path.parent.iterdir()] == [path]


def test_threads_add_in_any_order(tmp_path):
  def folder(name, workers):
    collection = Collection(tmp_path / name, NAMES, coco="polygons")
    label = [scenes.noise(9, 11, seed) for seed in range(12)]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      list(pool.map(lambda i: collection.add(Labeled(scenes.image(label[i]), label[i]), f"{i}"),
                    range(12)[:: 1 if workers == 1 else -1]))  # fmt: skip
    (path,) = collection.finish()
    return path.read_text()

  assert folder("one", 1) == folder("many", 6)


def copied(out, labeled, stem):
  Collection(out, NAMES, ["yolo"]).add(labeled, stem)
  return sorted(path.name for path in (out / "yolo/images").iterdir())


def test_images_are_copied_once_and_only_if_they_show_what_was_segmented(tmp_path, photos):
  out = tmp_path / "out"
  assert copied(out, photos[0], "a") == ["a.png"]
  path = out / "yolo/images/b.png"
  (out / "yolo/images/a.png").rename(path)
  before = path.stat().st_mtime_ns
  assert copied(out, Labeled(photos[0].image, photos[0].labels, path), "b") == ["b.png"]
  assert path.stat().st_mtime_ns == before
  for file in ("gone.png", __file__, "gs://bucket/a.png"):
    assert Labeled(photos[0].image, photos[0].labels, file).plain_file() is None
  other = Labeled(photos[2].image, photos[2].labels, photos[0].file)  # of another size
  copied(out, other, "c")
  with Image.open(out / "yolo/images/c.png") as image:
    np.testing.assert_array_equal(np.array(image), other.image)


def test_files_that_others_see_in_another_way_are_written_anew(tmp_path, photos):
  photo = photos[0]
  height, width = photo.size
  rgb, files = Image.fromarray(photo.image), {}
  cut = rgb.copy()
  cut.putalpha(Image.fromarray(np.full((height, width), 9, np.uint8)))
  opaque = rgb.convert("RGBA")
  values = photo.image.astype(np.uint16)  # black for who keeps the upper bits
  for name, content in {
    "cut.png": odd.stored(cut, "PNG"),
    "pages.webp": odd.stored(cut, "WEBP", save_all=True, append_images=[opaque]),
    "ink.jpg": odd.stored(rgb.convert("CMYK"), "JPEG"),
    "deep.png": odd.png16(values),
    "gray.png": odd.png16(values[..., :1]),
    "opaque.png": odd.stored(opaque, "PNG"),
    "palette.png": odd.stored(rgb.convert("P"), "PNG"),
    "exif.png": odd.stored(rgb, "PNG", exif=b"Exif\0\0no data"),
  }.items():
    files[name] = tmp_path / name
    files[name].write_bytes(content)
  plain = [name for name in files if Labeled(photo.image, photo.labels, files[name]).plain_file()]
  assert plain == ["opaque.png", "palette.png", "exif.png"]


def test_names_of_yaml():
  names = [
    "\x7f\x85\u2028\ufeff",
    "\U0001f600",
    "a: b",
    "- c",
    "no",
    "1",
    "#",
    "'",
    "{",
    "\t",
    "ü",
    *NAMES,
  ]
  assert [*yaml.safe_load(yolo.data_yaml(names))["names"].values()] == names
