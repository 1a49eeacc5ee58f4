"""Write the golden dumps of the recipes: `python -m tests.jobs.write_golden`."""

import json
import os

os.environ["FLAMINGO_CACHE"] = "/cache"

from jobs.recipes import RECIPES
from tests.jobs.test_recipes import GOLDEN, NAMED

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in NAMED:
        text = json.dumps(RECIPES[name].config().to_json(), indent=1) + "\n"
        (GOLDEN / f"{name}.json").write_text(text)
