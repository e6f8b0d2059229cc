"""Fields of a pre-training that depend on each other."""

import pytest

from configs import shapes_clip
from rpn_jax import config
from rpn_jax.base.errors import InputError


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"warmup_steps": 60, "steps": 60}, "warmup_steps=60: expected less than config.steps=60"),
    ({"unmasked_steps": 61, "steps": 60}, "unmasked_steps=61: expected at most config.steps=60"),
    ({"kept_patches": 0.001}, "kept_patches=0.001: expected at least one of the 64 .* as 0.0156"),
    ({"caption_tokens": 78}, "caption_tokens=78: expected at most config.clip.context_length=77"),
    ({"batch_size": 1}, "batch_size: expected at least 2"),  # whose loss is 0 whatever happens
    ({"seed": 1 << 63}, "seed: expected at most"),
    ({"scenes": "crowd"}, "did you mean 'crowded'"),
    ({"clip.image_size": 60}, "image_size=60: expected a multiple of config.clip.patch_size=8"),
    ({"clip.vision_heads": 5}, "vision_width=128: expected a multiple of .*vision_heads=5"),
    ({"clip.text_heads": 5}, "text_width=48: expected a multiple of config.clip.text_heads=5"),
    ({"clip.vocab_size": 1000}, "vocab_size=1000: expected 49408"),
    ({"clip.vision_layers": 0}, "vision_layers: expected an integer of at least 1, got 0"),
    ({"clip.activation": "gelo"}, "config.clip.activation='gelo' is not known; did you mean"),
  ],
)
def test_what_does_not_go_together(changes, message):
  c = shapes_clip.get_config()
  c.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=message):
    config.check(c)


@pytest.mark.parametrize("steps, phases", [(1, (0, 0)), (60, (10, 10)), (900, (100, 150))])
def test_warm_up_and_last_steps_follow_a_short_run(steps, phases):
  c = shapes_clip.get_config()
  c.steps = steps
  assert (c.warmup_steps, c.unmasked_steps) == phases
  config.check(c)
