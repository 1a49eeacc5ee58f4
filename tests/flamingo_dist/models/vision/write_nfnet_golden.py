"""Write the features of the published NFNet code: the oracle of test_nfnet.py.

It runs where jax, dm-haiku and dill are, which the tests do without:

    git clone https://github.com/google-deepmind/deepmind-research
    pip install jax dm-haiku dill
    PYTHONPATH=deepmind-research:. python -m tests.flamingo_dist.models.vision.write_nfnet_golden

Last run with jax 0.10.2, dm-haiku 0.0.17, dill 0.4.1, in fp64. The one change to the published code is that the
features before the pooling are returned: `outputs['grid'] = out` in `NFNet.__call__`.
"""

import dill
import haiku
import jax
import numpy as np
from nfnets import base, nfnet

from tests.flamingo_dist.models.vision.nfnet_material import GOLDEN, MEAN, PICKLED, STD, TINY, picture, values

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    base.nfnet_params["tiny"] = TINY | {"train_imsize": 64, "test_imsize": 64, "drop_rate": 0.2}
    network = haiku.transform(lambda x: nfnet.NFNet(10, "tiny")(x, is_training=False))
    pixels = (picture().transpose(0, 2, 3, 1) - MEAN) / STD
    fresh = network.init(jax.random.PRNGKey(0), pixels)
    shapes = {f"{module}/{name}": v.shape for module, parts in fresh.items() for name, v in parts.items()}
    flat = values(shapes)
    nested = {module: {name: flat[f"{module}/{name}"] for name in parts} for module, parts in fresh.items()}
    wide = {module: {n: v.astype(np.float64) for n, v in parts.items()} for module, parts in nested.items()}
    features = np.asarray(network.apply(wide, None, pixels)["grid"])
    np.savez(GOLDEN, features=features.reshape(len(features), -1, features.shape[-1]), names=sorted(shapes))
    few = {
        module: parts for module, parts in nested.items() if module.startswith("NFNet/~/nf_block_1/~/conv")
    }
    PICKLED.write_bytes(dill.dumps(few | {"NFNet/~/nf_block_1": nested["NFNet/~/nf_block_1"]}))
