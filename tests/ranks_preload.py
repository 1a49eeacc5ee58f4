"""What the fork server imports once for all ranks."""

import flamingo_dist.training.build
import flamingo_dist.training.checkpoint
import flamingo_dist.training.step  # noqa: F401
