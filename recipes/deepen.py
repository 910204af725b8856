"""Give a miniature two more blocks that change nothing at first: copies of the third and the fifth, answering zero.

python recipes/deepen.py runs/mini-apex-both/model runs/mini-apex-again/model -o runs/mini-apex-again/deeper

Of several models the mean of the weights is taken, as recipes/ship.py does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from ship import mean_of

AFTER = (2, 4)


def deepen(network: SanaTransformer2DModel, after: Sequence[int] = AFTER) -> SanaTransformer2DModel:
    """A network with the answers of `network`, and a copy that answers zero behind each of the blocks counted in `after`."""
    order = sorted([*range(len(network.transformer_blocks)), *after])
    deeper = SanaTransformer2DModel.from_config({**network.config, "num_layers": len(order)})
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("transformer_blocks.")}
    deeper.load_state_dict(state, strict=False)
    for place, (index, block) in enumerate(zip(order, deeper.transformer_blocks, strict=True)):
        block.load_state_dict(network.transformer_blocks[index].state_dict())
        if place > 0 and order[place - 1] == index:
            for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
                for parameter in last.parameters():
                    torch.nn.init.zeros_(parameter)
    return deeper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    backbone = mean_of(given.models)
    backbone.transformer = deepen(backbone.transformer)
    backbone.save(given.output, backbone.settings)
    print(given.output)


if __name__ == "__main__":
    main()
