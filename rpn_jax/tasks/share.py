"""An exported model to the Hugging Face hub, where others load it by its name.

    python main.py --mode=export --workdir=runs/voc
    python -m rpn_jax share runs/voc/export hf://owner/name
    python -m rpn_jax segment photo.jpg "a dog, grass" --model=hf://owner/name

The token is that of `hf auth login`, or HF_TOKEN; HF_ENDPOINT names another hub. Everything is
uploaded in one commit, or nothing.
"""

import argparse

from rpn_jax.base import console
from rpn_jax.base.paths import expand_local
from rpn_jax.weights import exported, prompts_file, upload
from rpn_jax.weights.checkpoints import PROMPTS


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn share",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", help="that --mode=export wrote")
  parser.add_argument("address", help="hf://owner/name; created if it is not there")
  parser.add_argument("--private", action="store_true", help="create the repository as private")
  parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
  args = parser.parse_args(arguments)
  return console.run_command(
    lambda: _share(args), interrupted="interrupted; a commit has all of the files or is not made"
  )


def _share(args: argparse.Namespace) -> None:
  repository = upload.check_address(args.address).repository
  files = upload.contents(expand_local(args.folder, "folder"), args.address)
  rows = [[name, f"{_size(file) / 1000:,.0f} kB"] for name, file in files.items()]
  print(console.table(rows, [f"to {args.address}", ""]), flush=True)
  clip = prompts_file.load(files[PROMPTS]).config["clip"]
  if not exported.is_public(clip):
    print(f"Its CLIP, {clip}, is not public: whoever loads the model needs that file, too.")
  if args.dry_run:
    print("Nothing was uploaded: --dry-run")
    return
  done = upload.share(files, repository, args.private)
  if done.changed:
    print(f"{args.address} is at commit {done.commit[:12]}: {done.page}")
    print(f"To use it: rpn segment IMAGE WORDS --model={args.address}")
  else:
    print(f"{args.address} has these very files already, at commit {done.commit[:12]}: {done.page}")


def _size(file) -> int:
  return len(file) if isinstance(file, bytes) else file.stat().st_size
