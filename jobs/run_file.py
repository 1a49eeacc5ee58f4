"""Reading back the configuration that a run folder holds."""

from pathlib import Path

from flamingo_dist.from_json import from_json, json_object
from jobs.config import RunConfig


def load_run_config(folder: Path) -> RunConfig:
    """Return the configuration of the run in `folder`.

    Raises:
        ValueError: there is no run, or its configuration is of another version of this code.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no config.json); give a run folder such as runs/demo.")
    try:
        config: RunConfig = from_json(RunConfig, json_object(path.read_bytes(), str(path)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this version of the code: {error}.") from error
    return config
