"""Which files of a folder are images, and where the results of each belong."""

import collections
import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence

from rpn_jax.base import buckets, origins, paths
from rpn_jax.base.errors import InputError

SUFFIXES = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif",
  ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c", ".heic", ".heif",
  ".hif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".pcx",
)  # fmt: skip
# Of images that are not read, and are said to be left out: raw photographs, drawings, documents,
# high dynamic range, medical images, JPEG XL, textures, icons.
_OTHER_SUFFIXES = (
  ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2", ".svg", ".eps", ".ai", ".pdf",
  ".psd", ".xcf", ".exr", ".hdr", ".dcm", ".nii", ".jxl", ".czi", ".lif", ".nd2", ".svs", ".dds",
  ".sgi", ".icns", ".pfm", ".qoi", ".cur", ".fits", ".wmf", ".emf",
)  # fmt: skip
FILM_SUFFIXES = (
  ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp", ".flv", ".f4v",
  ".mts", ".m2ts", ".ogv", ".vob", ".mxf",
)  # fmt: skip
# Of what stands beside images by the thousand, and is not opened to see whether it is one.
_NO_IMAGES = (".txt", ".json", ".xml", ".csv", ".npy", ".npz", ".yaml", ".yml", ".md")
# How the files of common formats begin, whatever they are called.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
LeftOut = Sequence[tuple[pathlib.Path, str]]


class Found:
  """The image files that somebody named.

  Attributes:
    root: the folder, or that of the file.
    files: by path.
    left_out: what looks like an image and is not among them, with the reason.
    named: the folder, or the file.
  """

  def __init__(
    self,
    root: pathlib.Path,
    files: Sequence[pathlib.Path],
    left_out: LeftOut,
    named: pathlib.Path | None = None,
  ):
    self.root, self.files, self.left_out = root, list(files), list(left_out)
    self.named = named or root

  def stems(self) -> list[pathlib.Path]:
    """For each file where its results belong below a folder for all of them, without a suffix.

    Subfolders stay, and names that differ in their suffix, in the case of letters or in Unicode's
    form only are told apart: `a/x` for a/x.jpg, `x_jpg` and `x_png` for x.jpg and x.png.
    """
    return distinct_stems([file.relative_to(self.root) for file in self.files])


def distinct_stems(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """A path without a suffix for each file, see `Found.stems`; no two are one on any disk.

  Args:
    files: relative paths; of two that are the same, one gets a number.
  """
  plain = [path.with_suffix("") for path in files]
  count = collections.Counter(map(_disk_key, plain))
  stems, used = [], {key for key, times in count.items() if times == 1}
  for path, stem in zip(files, plain):
    if count[_disk_key(stem)] > 1:
      longer = path.with_name(path.name.replace(".", "_"))
      stem, number = longer, 1
      while _disk_key(stem) in used:
        number += 1
        stem = longer.with_name(f"{longer.name}_{number}")
      used.add(_disk_key(stem))
    stems.append(stem)
  return stems


def _disk_key(stem: pathlib.Path) -> str:
  return paths.name_key(str(stem).casefold())


def find(
  path: str, *, recursive: bool | None = None, results: str | os.PathLike | None = None
) -> Found:
  """The path itself if it is a file, or the image files in the folder.

  Args:
    path: as somebody typed it.
    recursive: also in subfolders, but for hidden and linked ones; None where nobody can ask for it.
    results: a folder that is left out, since it is written to.

  Raises:
    InputError: there are none, `recursive` is asked for of a file, or the results would be images
      of the folder the next time.
  """
  root = paths.expand(path)
  if recursive and buckets.is_bucket(root):
    raise InputError(f"{path}: expected a local folder for --recursive; copy it, or name a file")
  if not root.exists():
    raise InputError(f"{path}: expected an image or a folder of images, no such file or folder")
  if recursive and root.is_file():
    raise InputError(f"{path}: expected a folder for --recursive, got a file; leave it out")
  if root.is_file():
    return Found(root.parent, [root], [], root)
  if not root.is_dir():
    raise InputError(
      f"{path}: expected an image or a folder of images, got a pipe or device; write it to a file"
    )
  if results is not None and os.path.realpath(results) == os.path.realpath(root):
    raise InputError(
      f"--out={results}: expected another folder than that of the images, which the next call "
      f"would look for among these results; a folder in it will do: --out={root / 'predictions'}"
    )
  files, left_out = _images_in(root, SUFFIXES, bool(recursive), results)
  if files and recursive is False and not buckets.is_bucket(root):
    below = folders_of_images(root, results)
    left_out += [(path, "subfolder of images (--recursive)") for path in below]
  if not files:
    where = "in this folder or below" if recursive else "in this folder"
    folders = recursive is False and any(child.is_dir() for child in root.iterdir())
    hint = "; --recursive looks into its subfolders" if folders else ""
    raise InputError(f"{path}: no image {where}{_summary(left_out)}{hint}")
  return Found(root, files, left_out)


def images_of(folders: Sequence[pathlib.Path]) -> Found:
  """The image files in some folders of one folder, by the order of the folders and by path."""
  return Found(folders[0].parent, *_images_of(folders, SUFFIXES, recursive=False))


def list_images(
  *folders: pathlib.Path, suffixes: Sequence[str] = SUFFIXES, recursive: bool = False
) -> list[pathlib.Path]:
  """The image files in some folders, by the order of the folders and by path.

  A line is printed about what looks like an image and is left out: hidden files, as macOS puts
  beside the images on other disks and in archives (`._a.jpg`), folders named like images, and
  images of other formats; and about linked folders, where subfolders are looked into.

  Args:
    folders: existing folders.
    suffixes: of the files, in lower case; files may have them in upper case.
    recursive: also take the files in subfolders, but for hidden and linked ones.

  Raises:
    OSError: a folder that cannot be read.
  """
  files, left_out = _images_of(folders, suffixes, recursive)
  if left_out:
    first = {why: path for path, why in left_out[::-1]}
    told = [f"{count} {why}, such as {first[why]}" for why, count in _counts(left_out).items()]
    print(f"left out of the images: {'; '.join(told)}", flush=True)
  return files


def summary(left_out: LeftOut) -> str:
  """How many files are left out for each reason."""
  return ", ".join(f"{count} {why}" for why, count in _counts(left_out).items())


def _summary(left_out: LeftOut) -> str:
  return f" ({summary(left_out)})" if left_out else ""


def _counts(left_out: LeftOut) -> dict[str, int]:
  return dict(collections.Counter(why for _, why in left_out))


def _images_of(
  folders: Iterable[pathlib.Path], suffixes: Sequence[str], recursive: bool
) -> tuple[list[pathlib.Path], list[tuple[pathlib.Path, str]]]:
  """The images of some folders, and what is left out; see `find`."""
  parts = [_images_in(folder, suffixes, recursive) for folder in folders]
  return [file for files, _ in parts for file in files], [each for _, out in parts for each in out]


def _images_in(
  folder: pathlib.Path,
  suffixes: Sequence[str],
  recursive: bool,
  results: str | os.PathLike | None = None,
) -> tuple[list[pathlib.Path], list[tuple[pathlib.Path, str]]]:
  """The images of a folder, and what is left out; see `find`."""
  if not recursive:
    return _sorted_out(folder.iterdir(), suffixes)
  children, linked = _walk(folder, results)
  files, left_out = _sorted_out(children, suffixes)
  return files, left_out + [(path, "linked folder") for path in linked]


def _sorted_out(
  children: Iterable[pathlib.Path], suffixes: Sequence[str]
) -> tuple[list[pathlib.Path], list[tuple[pathlib.Path, str]]]:
  """The images among files, and the others that look like some, with the reason."""
  files, left_out = [], []
  for path in sorted(children):
    suffix, hidden = path.suffix.lower(), path.name.startswith(".")
    if suffix in FILM_SUFFIXES and not hidden:
      left_out.append((path, "of a film"))
    elif suffix not in suffixes:
      if suffix in (*SUFFIXES, *_OTHER_SUFFIXES) and not hidden:
        left_out.append((path, "of another format"))
      elif suffix not in _NO_IMAGES and not hidden and _begins_like_an_image(path):
        left_out.append((path, "without the suffix of an image"))
    elif hidden:
      left_out.append((path, "hidden"))
    elif path.exists() and not path.is_file():  # who reads a broken link names it
      left_out.append((path, "not a file"))
    elif not buckets.is_bucket(path) and origins.is_result(path):
      left_out.append((path, "written by an earlier call"))
    else:
      files.append(path)
  return files, left_out


def _begins_like_an_image(path: pathlib.Path) -> bool:
  if buckets.is_bucket(path) or not path.is_file():
    return False
  with contextlib.suppress(OSError), path.open("rb") as file:
    return file.read(8).startswith(_BEGINNINGS)
  return False


def folders_of_images(
  root: pathlib.Path, without: str | os.PathLike | None = None
) -> list[pathlib.Path]:
  """The subfolders that have images of their own, but for hidden ones, results and one of them."""
  left = os.path.realpath(without) if without is not None else ""
  found = []
  for folder in sorted(root.iterdir()):
    if folder.is_dir() and _is_entered(folder, left):
      with contextlib.suppress(OSError):
        found += [folder] if _sorted_out(folder.iterdir(), SUFFIXES)[0] else []
  return found


def _is_entered(folder: pathlib.Path, left: str) -> bool:
  """Whether a folder is neither hidden, nor results, nor the one whose real path is given."""
  hidden = folder.name.startswith(".")
  return not hidden and os.path.realpath(folder) != left and not origins.is_results_folder(folder)


def _walk(
  folder: pathlib.Path, without: str | os.PathLike | None
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Files at any depth, and linked folders, which are not followed: they may lead back up.

  Data sets and films' frames by earlier calls are passed over; unreadable folders are not, as they
  would be by `Path.rglob`.
  """

  def refuse(error: OSError) -> None:
    raise error

  left = os.path.realpath(without) if without is not None else ""
  found, linked = [], []
  for parent, folders, files in os.walk(folder, onerror=refuse):
    folders[:] = [n for n in sorted(folders) if _is_entered(pathlib.Path(parent, n), left)]
    paths_of_folders = (pathlib.Path(parent, name) for name in folders)
    linked += [path for path in paths_of_folders if path.is_symlink()]
    found += [pathlib.Path(parent, name) for name in files]
  return found, linked
