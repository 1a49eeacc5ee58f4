"""Write the golden plans: `python -m tests.flamingo_dist.planning.write_golden`."""

import json

from tests.flamingo_dist.planning.shapes import GPU_COUNTS, LARGE
from tests.flamingo_dist.planning.test_plan import GOLDEN, golden_plan

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in LARGE:
        for gpus in GPU_COUNTS:
            path = GOLDEN / f"{name}-{gpus}-h100.json"
            path.write_text(json.dumps(golden_plan(name, gpus), indent=1) + "\n")
