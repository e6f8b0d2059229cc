"""Does a trained run use its relationship prompts? Scores with and without them at test time.

    python -m benchmarks.probe --config=configs/shapes.py --workdir=runs/shapes

Prints the scores of the newest checkpoint with and without its relationship prompts, and for each
layer the mean norm of the prompt tokens next to that of the patch tokens.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines import datasets
from rpn_jax.base.console import table
from rpn_jax.inference import evaluation
from rpn_jax.inference.predictor import open_run
from rpn_jax.tasks import evaluate

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Config of the run")
flags.DEFINE_string("workdir", None, "A finished run with relationship prompts")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  predictor, run = open_run(FLAGS.config, FLAGS.workdir)
  data = datasets.load(run.config)
  _, prompts = predictor.read_prompts(run)["last"]
  predictor = predictor.with_prompts(prompts)
  text = predictor.encoder.embed(data.names)
  examples = data.eval_examples()
  trained = predictor.network

  def scores(network):
    predictor.network = network
    return evaluation.evaluate(predictor.for_data(data), examples, data).scores

  without = dataclasses.replace(trained.config, rpm_layers="none")
  rows = {
    "as trained": scores(trained),
    "without relationship prompts": scores(trained.clone(config=without)),
  }
  print(evaluate.score_table(rows))

  crop = FLAGS.config.eval.crop
  image = jnp.asarray(examples[0]["image"][None, :crop, :crop])
  variables = {"params": predictor.params, "prompts": prompts}
  _, inside = trained.apply(variables, image, jnp.asarray(text), mutable=["intermediates"])
  inside = inside["intermediates"]
  project = lambda r: r @ prompts["prompt_proj"]["kernel"] + prompts["prompt_proj"]["bias"]
  mean_norm = lambda x: float(np.linalg.norm(x, axis=-1).mean())
  norms = [
    [i + 2, f"{mean_norm(project(r)):.2f}", f"{mean_norm(inside['hidden'][i][:, 1:]):.2f}"]
    for i, r in enumerate(inside["relationship"])
  ]
  print(table(norms, ["layer", "norm of prompt tokens", "norm of patch tokens"]))


if __name__ == "__main__":
  app.run(main)
