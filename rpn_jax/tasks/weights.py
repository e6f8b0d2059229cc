"""Public CLIP weights by name: what there is and what is here; fetched once, then kept.

    python -m rpn_jax weights
    python -m rpn_jax weights get ViT-B/16
    python -m rpn_jax weights get ViT-B/16 --from=pytorch_model.bin
    python -m rpn_jax weights rm ViT-B/16

The names work wherever a file of weights does. Any other repository of the hub with weights of CLIP
is hf://owner/name, and so is a trained model that somebody shared (`rpn share`), with @revision or
/file behind it if needed. HF_ENDPOINT names a mirror, HF_TOKEN a token for weights whose terms have
to be accepted; HF_HUB_OFFLINE=1 forbids the network.
"""

import argparse

from rpn_jax.base import console, paths
from rpn_jax.weights import clip_file, hub, transfer
from rpn_jax.weights.checkpoints import CHECKPOINTS, check_name


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn weights",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  actions = parser.add_subparsers(dest="action", metavar="get|rm")
  get = actions.add_parser("get", help="fetch and convert")
  get.add_argument("name")
  get.add_argument(
    "--from", dest="source", type=paths.expand, metavar="FILE",
    help="take these weights, downloaded by hand, as those of the name",
  )  # fmt: skip
  get.add_argument("--quiet", action="store_true", help="print nothing but errors")
  actions.add_parser("rm", help="remove from this machine").add_argument("name")
  args = parser.parse_args(arguments)

  def run() -> None:
    if args.action == "get":
      console.set_verbosity(args.quiet)
      _get(args)
    elif args.action == "rm":
      size = hub.remove(check_name(args.name))
      print(f"removed {size / transfer.MB:,.0f} MB" if size else f"{args.name} is not here")
    else:
      print(_listing())

  return console.run_command(run, interrupted="interrupted; the same command continues")


def _get(args: argparse.Namespace) -> None:
  checkpoint = check_name(args.name)
  if args.source:
    hub.adopt(checkpoint, args.source, clip_file.convert)
  elif hub.cached(checkpoint).exists():
    print(f"{checkpoint.name} is here already: {hub.cached(checkpoint)}")
  else:
    hub.get(checkpoint, clip_file.convert)


def _listing() -> str:
  """A table of at most 80 columns."""
  rows = [
    [row.name, row.publisher, row.license, f"{row.parameters / 1e6:.0f} M", hub.state(row) or None]
    for row in CHECKPOINTS.values()
  ]
  rows += [[row.name, "", "", "", hub.state(row)] for row in hub.others()]
  return "\n".join(
    [
      console.table(rows, ["name", "trained by, on", "license", "parameters", "here"]),
      f"Kept in {hub.folder()}.",
      "Fetched where a name is first used, or by: rpn weights get ViT-B/16",
      "Other repositories of the hub are named hf://owner/name.",
    ]
  )
