"""Weights by name: the whole way from a server that answers as the hub does, and all that fails."""

import hashlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import threading
import types

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from rpn_jax import Segmenter, cli
from rpn_jax.base import paths, transfer
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.tasks import demo
from rpn_jax.weights import arrays, checkpoints, clip_file, hub, names
from rpn_jax.weights import transfer as hub_transfer
from tests import ROOT, tiny
from tests.tools.hub_server import Fault, point_client, serve
from tests.weights.checks import flatten, one_line, same
from tests.weights.files import hf_names, write_shards, write_state

NAME, REPOSITORY = "ViT-T/8", "test/tiny"
# As transformers writes it for the tiny CLIP.
CONFIG = {
  "model_type": "clip",
  "projection_dim": 8,
  "vision_config": {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu",
  },
  "text_config": {
    "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
  },
}  # fmt: skip


def openai_state() -> dict:
  """The tiny CLIP by OpenAI's names."""
  rules = names.clip_rules(names.OPENAI, tiny.TINY.vision_layers, tiny.TINY.text_layers)
  flat = flatten(tiny._params(0))
  to_theirs = {
    "same": lambda x: x,
    "linear": np.transpose,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
  }
  return {r.theirs: to_theirs[r.layout](flat[r.ours]).copy(order="C") for r in rules}


@pytest.fixture(scope="module")
def served():
  """Repositories in the layouts of transformers and open_clip."""
  state = openai_state()
  openclip = {
    "embed_dim": 8, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
  }  # fmt: skip
  repositories = {
    REPOSITORY: {
      "config.json": json.dumps(CONFIG).encode(),
      "model.safetensors": safetensors.numpy.save(hf_names(state, 2, 1)),
      "README.md": b"tiny",
    },
    "test/openclip": {
      "open_clip_config.json": json.dumps({"model_cfg": openclip}).encode(),
      "open_clip_model.safetensors": safetensors.numpy.save(state),
      "model.safetensors": b"the image tower alone",
    },
    "test/empty": {"README.md": b""},
  }
  with serve(repositories) as server:
    yield server


@pytest.fixture
def server(served, tmp_path, monkeypatch):
  """An empty cache, a network without faults, and a row for the tiny CLIP in the table."""
  served.faults.clear()
  served.log.clear()
  served.files.clear()
  point_client(served, tmp_path, monkeypatch)
  monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
  monkeypatch.setitem(checkpoints.CHECKPOINTS, NAME, row())
  paths.cache_dir.cache_clear()
  yield served
  paths.cache_dir.cache_clear()
  huggingface_hub.close_session()


def row(**changes) -> checkpoints.Checkpoint:
  fields = {"files": checkpoints.TRANSFORMERS, "config": tiny.TINY, "parameters": 417_000}
  return checkpoints.Checkpoint(**({"name": NAME, "repository": REPOSITORY} | fields | changes))


def kept() -> list[str]:
  """Files of the cache but the locks."""
  return sorted(
    str(path.relative_to(hub.folder()))
    for path in hub.folder().rglob("*")
    if path.is_file() and path.suffix != ".lock"
  )


def test_the_whole_way(server, tmp_path, monkeypatch, capsys):
  """A fresh process fetches; this one, without a network, reads what is there."""
  environment = os.environ | {
    "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
    "XDG_CACHE_HOME": str(tmp_path / "cache"),
  }  # fmt: skip
  command = [
    "segment", str(ROOT / "rpn_jax/assets/scene.png"), "sand, water",
    f"--model=hf://{REPOSITORY}", "--templates=single",
  ]  # fmt: skip
  done = subprocess.run(
    [sys.executable, "-m", "rpn_jax", *command, f"--out={tmp_path}/1"], cwd=ROOT, env=environment,
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  requests = list(server.log)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert cli.main([*command, f"--out={tmp_path}/2"]) == 0
  offline = capsys.readouterr().out
  assert "is here now" in done.stdout and "is here now" not in offline
  assert all(f"hf://{REPOSITORY}" in said for said in (done.stdout, offline))
  results = [json.loads((tmp_path / out / "scene.json").read_text()) for out in "12"]
  assert results[0]["classes"] == results[1]["classes"]
  assert server.log == requests and requests[0] == "GET api - -"
  assert kept() == ["test--tiny.safetensors"]


def test_both_layouts_hold_the_same_weights(server):
  config, params = clip_file.load_clip(f"hf://{REPOSITORY}")
  assert config == tiny.TINY
  same(params, tiny._params(0))
  config, params = clip_file.load_clip("hf://test/openclip@main")
  assert config == tiny.TINY
  same(params, tiny._params(0))
  header = arrays.read_safetensors(hub.folder() / "test--openclip@main.safetensors")[1]
  assert header["fingerprint"] == arrays.fingerprint(params)
  assert header["origin"].startswith("hf://test/openclip@c0ffee")
  assert header["origin"].endswith("/open_clip_model.safetensors")


def test_a_row_needs_the_file_of_weights_only_and_is_fetched_once(server, monkeypatch):
  files = dict(server.repositories[REPOSITORY])
  monkeypatch.setitem(
    server.repositories, REPOSITORY, {"model.safetensors": files["model.safetensors"]}
  )
  one_line("needs a training run or its prompts", Segmenter.load, NAME, method="rpn")
  assert server.log == []  # nothing is fetched in vain
  segmenter = Segmenter.load("vit-t-8", templates="single")
  assert NAME in segmenter.method
  requests = list(server.log)
  assert requests == ["GET api - -", "HEAD resolve - -", "GET resolve - -", "GET cdn - -"]
  monkeypatch.setattr(hub, "_fetch", None)
  assert clip_file.load_clip(NAME)[0] == tiny.TINY and server.log == requests


def test_what_exists_under_the_name_is_used_and_said(server, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "ViT-T").mkdir()
  tiny.save(tmp_path / NAME, seed=1)
  same(clip_file.load_clip(NAME)[1], tiny._params(1))
  assert f"the local {tmp_path / NAME} is used, not the published {NAME}" in capsys.readouterr().out
  assert server.log == []


def test_a_downloaded_folder_is_a_model(server, tmp_path):
  for name, content in server.repositories[REPOSITORY].items():
    (tmp_path / name).write_bytes(content)
  assert Segmenter.load(tmp_path, templates="single").predictor.clip == tiny.TINY


def sharded() -> dict[str, bytes]:
  """A repository of transformers whose weights are in three shards."""
  with tempfile.TemporaryDirectory() as folder:
    write_shards(pathlib.Path(folder), hf_names(openai_state(), 2, 1))
    files = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
  return files | {
    "config.json": json.dumps(CONFIG).encode(),
    "preprocessor_config.json": b"{}",
  }


def test_shards(server, monkeypatch):
  """All are fetched, the rest of an interrupted transfer only, and a missing one is named."""
  files = sharded()
  monkeypatch.setitem(server.repositories, "test/shards", files)
  name, shards = "hf://test/shards", sorted(x for x in files if x.startswith("model-"))
  assert len(shards) == 3
  lacking = {x: content for x, content in files.items() if x != shards[2]}
  monkeypatch.setitem(server.repositories, "test/shards", lacking)
  one_line("HTTP 404, no such file", clip_file.load_clip, name)
  monkeypatch.setitem(server.repositories, "test/shards", files)
  server.log.clear()
  config, params = clip_file.load_clip(name)
  assert config == tiny.TINY and server.log.count("GET cdn - -") == 1
  same(params, tiny._params(0))
  assert kept() == ["test--shards.safetensors"]
  # By its index, too, and from what another program fetched.
  for file in files:
    huggingface_hub.hf_hub_download("test/shards", file)
  server.log.clear()
  same(clip_file.load_clip(f"{name}/model.safetensors.index.json")[1], tiny._params(0))
  assert server.log == []
  hub.remove(checkpoints.find(name))
  next(pathlib.Path(constants.HF_HUB_CACHE).rglob(shards[1])).unlink()
  same(clip_file.load_clip(name)[1], tiny._params(0))
  assert server.log.count("GET cdn - -") == 1


def test_an_index_leads_nowhere_else(server, monkeypatch):
  index = json.dumps({"weight_map": {"logit_scale": "../../x.safetensors"}}).encode()
  monkeypatch.setitem(server.repositories, "test/shards", sharded() | {
    "model.safetensors.index.json": index})  # fmt: skip
  one_line("expected file names in .*got the path", clip_file.load_clip, "hf://test/shards")


def test_the_token_stays_on_the_hub(server, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_secret")
  clip_file.find_weights(NAME)
  assert set(server.log) >= {"GET api - token", "GET resolve - token", "GET cdn - -"}
  assert "GET cdn - token" not in server.log


def test_what_another_program_fetched_is_used(server, capsys):
  huggingface_hub.hf_hub_download(REPOSITORY, "model.safetensors")
  server.log.clear()
  clip_file.find_weights(NAME)
  assert server.log == []
  # Damaged, it is not.
  blob = next(pathlib.Path(constants.HF_HUB_CACHE).rglob("blobs/*"))
  blob.write_bytes(blob.read_bytes()[:-1] + b"?")
  hub.remove(row())
  capsys.readouterr()
  same(clip_file.load_clip(NAME)[1], tiny._params(0))
  assert "is damaged and left out" in capsys.readouterr().out and server.log


def test_what_another_program_left_out_is_fetched(server, monkeypatch):
  """The mean and std, where transformers loaded a model without its processor."""
  files = server.repositories[REPOSITORY]
  half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32, "crop_size": 32}
  added = {"preprocessor_config.json": json.dumps(half).encode()}
  monkeypatch.setitem(server.repositories, REPOSITORY, files | added)
  for name in ("model.safetensors", "config.json"):
    huggingface_hub.hf_hub_download(REPOSITORY, name)
  server.log.clear()
  assert clip_file.load_clip(f"hf://{REPOSITORY}")[0].mean == (0.5,) * 3
  assert not any(line.startswith("GET cdn") for line in server.log)  # it has the weights alone
  hub.remove(checkpoints.find(f"hf://{REPOSITORY}"))
  huggingface_hub.hf_hub_download(REPOSITORY, "preprocessor_config.json")
  server.log.clear()
  assert clip_file.load_clip(f"hf://{REPOSITORY}")[0].mean == (0.5,) * 3 and server.log == []


# Transfers that break


def test_an_interrupted_transfer_resumes(server):
  """Within a command, and in the next one, with not a byte twice."""
  content = server.repositories[REPOSITORY]["model.safetensors"]
  server.faults["cdn"] = Fault(cut=500_000, times=1)
  clip_file.find_weights(NAME)
  assert server.log[-2:] == ["GET resolve bytes=500000- -", "GET cdn bytes=500000- -"]
  hub.remove(row())
  server.faults["cdn"] = Fault(cut=0)
  part = hub._unfinished(row())
  part.mkdir()
  digest = hashlib.sha256(content).hexdigest()
  (part / "model.safetensors.0123.part").write_bytes(b"of an older version")
  (part / f"model.safetensors.{digest[:12]}.part").write_bytes(content[:700_000])
  message = one_line("could not be fetched: ", clip_file.find_weights, NAME)
  assert "the connection broke (peer closed connection" in message
  assert [file.name for file in part.glob("*.part")] == [f"model.safetensors.{digest[:12]}.part"]
  assert hub.state(row()) == "1 MB so far"
  del server.faults["cdn"]
  clip_file.find_weights(NAME)
  assert server.log[-1] == "GET cdn bytes=700000- -"
  same(clip_file.load_clip(NAME)[1], tiny._params(0))
  assert kept() == ["ViT-T-8.safetensors"]


def fetch(server, path: pathlib.Path, **changes) -> None:
  content = server.repositories[REPOSITORY]["model.safetensors"]
  known = {"size": len(content), "checksum": hashlib.sha256(content).hexdigest()}
  server.files["whole"] = content
  hub_transfer.fetch(server.url("whole"), path, "x", **(known | changes))


def test_a_server_without_ranges_starts_over(server, tmp_path):
  content = server.repositories[REPOSITORY]["model.safetensors"]
  part = tmp_path / f"whole.{hashlib.sha256(content).hexdigest()[:12]}.part"
  part.write_bytes(content[:1000])
  server.faults["file"] = Fault(status=200, body=content, headers={"Content-Range": "none"})
  fetch(server, tmp_path / "whole")
  assert server.log == ["GET file bytes=1000- -"]
  assert (tmp_path / "whole").read_bytes() == content and not part.exists()


def test_two_at_once_fetch_once(server, capsys):
  server.faults["cdn"] = Fault(slow=0.3)
  threads = [threading.Thread(target=clip_file.find_weights, args=(NAME,)) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert server.log.count("GET cdn - -") == 1 and kept() == ["ViT-T-8.safetensors"]
  # The other one may not have written its name yet.
  holder = rf"(process {os.getpid()} on \S+|another process)"
  out = capsys.readouterr().out
  assert re.search(rf"{re.escape(f'{NAME} in {hub.folder()}')} is in use by {holder}: waiting", out)


# The conversion is a copy, which is done in no time.
FETCH = """
import shutil, sys
from huggingface_hub import constants
from rpn_jax.weights import checkpoints, hub
row = checkpoints.find(sys.argv[1])
print(hub.get(row, lambda source, row, path, origin: shutil.copy(source, path)))
"""


def test_two_processes_fetch_once(server, tmp_path):
  server.faults["cdn"] = Fault(slow=1.0)
  environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"),
                              "HF_HUB_OFFLINE": "0"}  # fmt: skip
  command = [sys.executable, "-c", FETCH, f"hf://{REPOSITORY}"]
  both = [
    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  out = [process.communicate(timeout=120)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert server.log.count("GET cdn - -") == 1 and kept() == ["test--tiny.safetensors"]
  path = str(hub.folder() / "test--tiny.safetensors")
  assert [text.splitlines()[-1] for text in out] == [path, path]


REFUSALS = {
  "api 401": ("api", Fault(status=401), "HTTP 401: no such repository, or a private one"),
  "api 403": ("api", Fault(status=403), "HTTP 403, access refused"),
  "gated": (
    "resolve", Fault(status=403, headers={"X-Error-Code": "GatedRepo"}), "HTTP 403: accept the te",
  ),
  "api 404": (
    "api", Fault(status=404, headers={"X-Error-Code": "RevisionNotFound"}), "no such revision",
  ),
  "cdn 404": ("cdn", Fault(status=404), "HTTP 404, no such page"),
  "api 429": ("api", Fault(status=429, headers={"Retry-After": "37"}), "429.*try again in 37 s"),
  "cdn 429": ("cdn", Fault(status=429), "429, too many requests: try again in some minutes"),
  "head 503": ("resolve", Fault(status=503), "HTTP 503: try again later"),
  "api html": (
    "api", Fault(body=b"<html>log in</html>", headers={"Content-Type": "text/html"}),
    "the answer is not the hub's but some page",
  ),
  "head html": (
    "resolve", Fault(status=200, headers={"X-Repo-Commit": "", "ETag": "", "Location": ""}),
    "the answer is not the hub's",
  ),
  "cdn html": (
    "cdn", Fault(body=b"<html>", headers={"Content-Type": "text/html; charset=utf-8"}),
    "a page of HTML came instead of the file",
  ),
  "wrong bytes": ("cdn", Fault(body=b"x" * 1_700_000), "expected .* bytes, got"),
}  # fmt: skip


@pytest.mark.parametrize("place, fault, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(server, place, fault, message):
  server.faults[place] = fault
  error = one_line(message, clip_file.find_weights, NAME)
  page = f"https://huggingface.co/{REPOSITORY}/tree/main"
  assert error.startswith(f"{NAME} could not be fetched: ")
  assert error.endswith(
    f"By hand: get model.safetensors or pytorch_model.bin from {page}, then run: rpn weights get "
    f"{NAME} --from=FILE"
  )
  assert "ViT-T-8.safetensors" not in kept()


def test_wrong_bytes_of_the_right_length(server):
  content = bytearray(server.repositories[REPOSITORY]["model.safetensors"])
  content[-100] ^= 1
  server.faults["cdn"] = Fault(body=bytes(content), times=1)
  one_line("expected the checksum .*, got .*: the file was damaged", clip_file.find_weights, NAME)
  assert [name for name in kept() if "model" in name] == []
  clip_file.find_weights(NAME)  # and the next command begins anew
  assert server.log[-1] == "GET cdn - -"


def test_a_small_file_is_checked_too(server):
  server.faults["small"] = Fault(body=b'{"vision_config": {}, "text_config": {}}' + b" " * 30)
  message = one_line("could not be fetched", clip_file.find_weights, f"hf://{REPOSITORY}")
  assert "bytes, got" in message or "checksum" in message


def test_without_a_checksum_only_the_size_is_compared(server, capsys):
  server.faults["resolve"] = Fault(headers={"X-Linked-Etag": '"unusual"'})
  clip_file.find_weights(NAME)
  assert "tells no checksum of model.safetensors" in capsys.readouterr().out
  server.faults["resolve"].headers["X-Linked-Size"] = ""
  hub.remove(row())
  one_line("tells neither size nor checksum", clip_file.find_weights, NAME)


def test_no_network(server, monkeypatch):
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
  one_line("no connection .*set HF_ENDPOINT to a mirror", clip_file.find_weights, NAME)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  one_line("HF_HUB_OFFLINE is set, so nothing is fetched", clip_file.find_weights, NAME)


def test_a_full_disk(server, monkeypatch, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
  try:
    one_line("cannot write .*File too large.*free some disk space", clip_file.find_weights, NAME)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  clip_file.find_weights(NAME)
  assert "bytes=" in server.log[-1]
  hub.remove(row())
  monkeypatch.setattr(
    transfer.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000)
  )
  one_line("expected 2 MB of free disk space in .*, got 1 MB", clip_file.find_weights, NAME)


# Second addresses


def test_a_killed_conversion(server, monkeypatch):
  """What came stays, what was half written goes, and nothing of it is taken for whole."""

  def killed(source, row, path, origin):
    (path.parent / f".{path.name}.0123456789abcdef.tmp").write_bytes(b"half")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    hub.get(row(), killed)
  assert not hub.cached(row()).exists() and len(kept()) == 3
  server.log.clear()
  same(clip_file.load_clip(NAME)[1], tiny._params(0))
  assert "GET cdn - -" not in server.log and kept() == ["ViT-T-8.safetensors"]


def test_a_cache_that_cannot_be_written(server, monkeypatch):
  clip_file.find_weights(NAME)
  monkeypatch.setattr(os, "access", lambda *_: False)
  same(clip_file.load_clip(NAME)[1], tiny._params(0))  # what is there is used
  refused = r"expected a folder to keep weights in, got .*\(it cannot be written\): set XDG_CACHE"
  one_line(refused, clip_file.find_weights, f"hf://{REPOSITORY}")
  one_line(refused, hub.remove, row())


def test_the_page_takes_a_name(server):
  """And offers it under the name that was typed."""
  models = demo.Models([f"hf://{REPOSITORY}"])
  choices = (models.names[0], demo.OWN_METHOD)
  result = demo.segment(models, str(demo.SCENE), "sand, water", "", 0.0, *choices)
  assert f"hf://{REPOSITORY}" in result.method and result.labels.shape == (192, 256)
  one_line("hf://test/none could not be fetched: HTTP 401", demo.Models, ["hf://test/none"])


def test_the_second_address(server, tmp_path, monkeypatch):
  file = write_state(tmp_path / "tiny.pt", openai_state())
  server.files["tiny.pt"] = file.read_bytes()
  digest = transfer.sha256(file)
  second = row(url=server.url("tiny.pt"), sha256=digest)
  monkeypatch.setitem(checkpoints.CHECKPOINTS, NAME, second)
  server.faults["api"] = Fault(status=503)
  same(clip_file.load_clip(NAME)[1], tiny._params(0))
  hub.remove(second)
  server.files["tiny.pt"] = server.files["tiny.pt"][:-1] + b"?"
  error = one_line(
    "HTTP 503: try again later; http://127.*expected the ch", clip_file.load_clip, NAME
  )
  assert digest in error and kept() == []


# What came


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"vision_layers": 3}, "expected -> got: vision_layers: 3 -> 2"),
    ({"activation": "gelu"}, "expected -> got: activation: gelu -> quick_gelu"),
  ],
)
def test_another_architecture(server, monkeypatch, changes, message):
  config = CLIPConfig(**{**tiny.TINY.__dict__, **changes})
  monkeypatch.setitem(checkpoints.CHECKPOINTS, NAME, row(config=config))
  one_line(message, clip_file.find_weights, NAME)
  assert kept() == []


def test_values_that_are_not_finite(server, monkeypatch):
  state = hf_names(openai_state(), 2, 1)
  state["logit_scale"] = np.array(np.nan, np.float32)
  files = server.repositories[REPOSITORY] | {"model.safetensors": safetensors.numpy.save(state)}
  monkeypatch.setitem(server.repositories, REPOSITORY, files)
  one_line(
    "expected finite weights, 1 of the 1 values of .logit_scale", clip_file.find_weights, NAME
  )
  assert kept() == []


def test_a_repository_without_weights(server):
  one_line(r"no prompts.safetensors of a trained model, and no weights of CLIP \(open_", hub.get,
           checkpoints.find("hf://test/empty"), clip_file.convert)  # fmt: skip


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_normalization_comes_with_the_weights(name, server, monkeypatch):
  files = server.repositories[REPOSITORY]
  images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
  added = {name: json.dumps({"image_processor": images}).encode()}
  monkeypatch.setitem(server.repositories, REPOSITORY, files | added)
  config, _ = clip_file.load_clip(NAME)
  assert (config.mean, config.std, config.squash) == ((0.5,) * 3, (0.5,) * 3, True)


def test_another_tokenizer_is_refused_by_name(server, monkeypatch):
  files = server.repositories[REPOSITORY]
  added = {"tokenizer_config.json": b'{"tokenizer_class": "XLMRobertaTokenizer"}'}
  monkeypatch.setitem(server.repositories, REPOSITORY, files | added)
  one_line("CLIP's tokenizer .*XLMRobertaTokenizer", clip_file.load_clip, f"hf://{REPOSITORY}")


# The command


def command(*arguments) -> int:
  return cli.main(["weights", *arguments])


def test_the_list_fits_a_terminal(server, capsys):
  clip_file.find_weights(f"hf://{REPOSITORY}")
  capsys.readouterr()
  assert command() == 0
  lines = capsys.readouterr().out.splitlines()
  assert max(len(line) for line in lines if "Kept in" not in line) <= 80
  assert any(line.split() == ["ViT-B/16", "OpenAI", "MIT", "150", "M", "-"] for line in lines)
  assert any(line.startswith(f"hf://{REPOSITORY} ") and line.endswith("2 MB") for line in lines)


def test_get_and_remove(server, tmp_path, capsys):
  assert command("get", NAME) == 0
  assert f"is here now: {hub.cached(row())}" in capsys.readouterr().out
  assert command("get", NAME) == 0 and "is here already" in capsys.readouterr().out
  assert command("rm", NAME) == 0 and "removed 2 MB" in capsys.readouterr().out
  assert command("rm", NAME) == 0 and "is not here" in capsys.readouterr().out
  assert kept() == []
  assert command("get", "vit-b/17") == 2
  assert "did you mean" in capsys.readouterr().err


def test_what_was_downloaded_by_hand(server, tmp_path, capsys):
  """A file alone is enough for a row; its architecture is checked."""
  file = tmp_path / "downloaded"
  file.write_bytes(server.repositories[REPOSITORY]["model.safetensors"])
  assert command("get", NAME, f"--from={file}") == 0
  same(clip_file.load_clip(NAME)[1], tiny._params(0))
  assert server.log == []
  assert command("get", "ViT-B/16", f"--from={clip_file.ASSETS}/shapes_clip.safetensors") == 2
  assert "got another architecture" in capsys.readouterr().err
  assert command("get", NAME, f"--from={tmp_path}/nothing") == 2
  assert "does not exist" in capsys.readouterr().err


def test_what_a_repository_does_not_tell_is_told_to_the_converter(server, tmp_path, monkeypatch):
  """Many hold one file of weights and no config; the message has the command that reads it."""
  weights = server.repositories["test/openclip"]["open_clip_model.safetensors"]
  monkeypatch.setitem(server.repositories, "test/bare", {"a.safetensors": weights})
  name, out = "hf://test/bare/a.safetensors", tmp_path / "out.safetensors"
  told = {"vision_heads": 2, "text_heads": 2, "activation": "quick_gelu"}
  for i in range(3):
    given = dict(list(told.items())[:i])
    flag = [*told][i]
    one_line(
      rf"{name} does not tell .*rpn convert.* --{flag}=", clip_file.find_weights, name, given
    )
  flags = [f"--{flag}={value}" for flag, value in told.items()]
  assert cli.main(["convert", name, str(out), *flags]) == 0
  assert clip_file.load(out)[0] == clip_file.load_clip(name)[0] == tiny.TINY


def test_the_converter_takes_a_name(server, tmp_path):
  out = tmp_path / "half.safetensors"
  assert cli.main(["convert", f"hf://{REPOSITORY}", str(out), "--dtype=float16"]) == 0
  assert clip_file.load(out)[0] == tiny.TINY
